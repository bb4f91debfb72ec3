"""What stands against what, and how each side is asked. Importing this imports neither side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Settings = dict[str, Any]
BATCH = 8  # examples of an optimiser step


class Side(Protocol):
    """One tool with its work before it. `epoch` does the whole of it once."""

    tokens: int  # distinct tokens of the work: no padding, a prompt that several answers share counted once
    flops: float  # floating-point operations that these tokens need, at least; 0 where that says nothing

    def epoch(self) -> None: ...

    def loss(self) -> float:
        """A number that both sides must agree on, from the same weights and rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Contest:
    """One workload in one precision, ours against one other way of doing it.

    Args:
        make: (side: "temper" or "other", a folder of its own, settings) → the side. It imports its tool itself.
        tool: what the other side is made of: trl or transformers.
        asked: how many times as fast we mean to be; None: nothing is promised.
        weights: whether the sides load the shared model, whose weights then do not count as memory taken.
        share: of the machine's peak that our useful tokens are to reach.
        grid: settings of the other side, of which the fastest is taken; empty: `theirs` is all.
        some: settings of both sides that make the grid's trial smaller.
    """

    name: str
    against: str
    make: Callable[[str, Path, Settings], Side]
    tool: str = "trl"
    asked: float | None = None
    share: float | None = None
    weights: bool = True
    ours: Settings = dataclasses.field(default_factory=dict)
    theirs: Settings = dataclasses.field(default_factory=dict)
    grid: tuple[Settings, ...] = ()
    some: Settings = dataclasses.field(default_factory=dict)


def grid(sizes: tuple[int, ...], *, lengths: bool = True, **fixed: Any) -> tuple[Settings, ...]:
    """Examples of one forward pass, like lengths together or not; a step stays one of BATCH examples."""
    return tuple(
        {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size,
            "gradient_checkpointing": False, **({"train_sampling_strategy": "group_by_length"} if grouped else {}), **fixed,
        }
        for size in sizes
        for grouped in ((False, True) if lengths and size > 1 else (False,))
    )  # fmt: skip
