"""Temper's side of training: the loop of a stage as `temper run` starts it, caught before its first step.

So nothing is timed that users do not get: rows are read, proven and packed by the stage, steps are the loop's own, with
everything it logs. What a run does beside its steps (checkpoints, validation) is left out on both sides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contest import BATCH
from shapes import cool, warm

from temper.app import run_recipe
from temper.engine.loop import Loop


class Caught(BaseException):
    """Carries a loop out of the stage that made it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop


def base() -> str:
    return os.environ["TEMPER_BENCH_BASE"]


def loop_of(folder: Path, rows: list[dict[str, Any]], stage: dict[str, Any], *, model: str | None = None) -> Loop:
    """The loop of one stage that trains `base` on rows."""

    def caught(self: Loop) -> None:
        raise Caught(self)

    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {
        "stage": "data", "source": "rows.jsonl", "validation": 0, "test": 0, "near_leaks": False,
        "drop": {"duplicates": "off"}, "format": {"chat": "plain", "separator": " "},
    }  # fmt: skip
    trained = {
        "data": "rows", "batch_size": BATCH, "lr": 1e-6, "schedule": "constant", "max_steps": 10**6, "keep_best": False,
        "warmup": 0, **stage,
    }  # fmt: skip
    recipe = {
        "name": "bench", "model": model or base(), "threads": torch.get_num_threads(),
        "stages": {"rows": data, "trained": trained},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    with mock.patch.object(Loop, "run", caught):
        try:
            run_recipe(file, out=folder / "run", quiet=True)
        except Caught as found:
            found.loop.root.parent.mkdir(parents=True, exist_ok=True)
            return found.loop
    raise RuntimeError("the stage ended without a loop")


class Trained:
    """A stage's loop, its epochs one after another."""

    def __init__(self, loop: Loop, examples: int, *, warmed: bool = False) -> None:
        self.loop, self.steps, self.warmed = loop, examples // BATCH, warmed
        self.tokens = sum(r.tokens for k in range(self.steps) for r in self.loop.batches.rows(k))
        self.flops = 0.0

    def epoch(self) -> None:
        for _ in range(self.steps):
            self.loop._step()

    def loss(self) -> float:
        """Mean over the rows of an epoch, by the loop's own gradients; of adapters that are not at their start where asked."""
        total = weight = 0.0
        if self.warmed:
            warm(self.loop.policy)
        for k in range(self.steps):
            rows = self.loop.batches.rows(k)
            divisor = float(sum(r.weight.sum() for r in rows))
            total += self.loop.gradients(rows)[0] * divisor
            weight += divisor
        self.loop.optimizer.zero_grad(set_to_none=True)
        if self.warmed:
            cool(self.loop.policy)
        return total / weight
