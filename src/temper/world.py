"""Processes that run one recipe together. This one is alone; `engine/processes.py` has the other.

Every process runs the same training on its share of each batch; all else is done by the first, the main one, and what it
decides it tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field

Parallel = Literal["ddp", "fsdp"]


class Launch(pydantic.BaseModel):
    """On how many processes of this machine a recipe trains, and how."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    processes: int = Field(default=1, ge=1, description="Processes that `temper run` starts; 1: none but itself.")
    parallel: Parallel = Field(
        default="ddp",
        description="ddp: each process has the whole model; fsdp: its weights, gradients and optimiser are spread over all.",
    )
    patience: float = Field(
        default=50.0, gt=0, description="Seconds that processes wait for one that is behind, before the run ends."
    )


class Left(Exception):
    """This process's part of a stage is over: the main one goes on alone."""


class World:
    """One process."""

    rank, size = 0, 1
    parallel: Parallel | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and decides."""
        return self.rank == 0

    def told(self, decide: Callable[[], Any]) -> Any:
        """What the main process decides, everywhere; the others wait for as long as that takes."""
        return decide()

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, everywhere, by rank."""
        return [value]

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums of all processes' values, everywhere."""
        return list(values)

    def close(self) -> None:
        """Leave the others."""
