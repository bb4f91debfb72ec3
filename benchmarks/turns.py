"""Two sides timed in turns, so that whatever else the machine does falls on both; their ratio is what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(what: str, ours: tuple[str, Callable[[], object]], theirs: tuple[str, Callable[[], object]], rounds: int) -> None:  # fmt: skip
    """Print the median times of both, named, and the median and range of their ratios. What is done once must be done."""
    taken = [(seconds(ours[1]), seconds(theirs[1])) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in taken)
    a, b = (statistics.median(column) for column in zip(*taken, strict=True))
    print(
        f"{what}: {ours[0]} {a:.2f} s, {theirs[0]} {b:.2f} s, {statistics.median(ratios):.2f} times as fast "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )
