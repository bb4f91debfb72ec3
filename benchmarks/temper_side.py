"""Temper's side of training: the loop of a stage as `temper run` starts it, caught before its first step.

So nothing is timed that users do not get: rows are read, proven and packed by the stage, steps are the loop's own, with
everything it logs. What a run does beside its steps (checkpoints, validation) is left out on both sides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from contest import BATCH
from shapes import cool, warm

from temper.app import run_recipe
from temper.engine.loop import Loop
from temper.rollouts.decoding import Completion
from temper.stages.experience import Experience
from temper.stages.rollout import Rollout, text_of
from temper.trees import Row


class Caught(BaseException):
    """Carries a loop out of the stage that made it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop


def base() -> str:
    return os.environ["TEMPER_BENCH_BASE"]


def loop_of(folder: Path, rows: list[dict[str, Any]], stage: dict[str, Any], *, model: str | None = None) -> Loop:
    """The loop of one stage that trains `base` on rows. A field of the stage that is None is left out."""

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
    trained = {name: value for name, value in trained.items() if value is not None}
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


class Practised:
    """The loop of `rl`: a step samples completions of its prompts, rewards them and learns from them.

    Args:
        prompts: token ids of all prompts; an epoch asks each once.
        recorded: completions of each prompt of one step, on which both sides' gradients are compared.
        new: tokens of every completion.
    """

    def __init__(self, loop: Loop, prompts: list[list[int]], recorded: list[list[list[int]]], new: int) -> None:
        self.loop, self.made = loop, cast(Experience, loop.batches)
        plan = self.made.plan
        self.steps, self.recorded, self.new = len(prompts) // plan.prompts, recorded, new
        self.places = {tuple(prompt.ids): k for k, prompt in enumerate(self.made.prompts)}
        assert set(self.places) == {tuple(ids) for ids in prompts}, "the prompts did not reach the stage as these ids"
        self.asked = [self.places[tuple(ids)] for ids in prompts[: len(recorded)]]
        self.tokens = sum(map(len, prompts)) + len(prompts) * plan.completions * new
        self.flops = 0.0

    def epoch(self) -> None:
        before = self.loop.state["tokens"]
        for _ in range(self.steps):
            self.loop._step()
        assert self.loop.state["tokens"] - before == self.tokens, "a completion ended early"

    def loss(self) -> float:
        """Norm of the gradient of one step on the recorded completions, from adapters that are not at their start.

        Not the loss itself: of completions of one length the advantages of a prompt cancel out in it.
        """
        warm(self.loop.policy)
        rows = self._rows()
        self.loop.gradients(rows)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.loop.policy.parameters() if p.grad is not None])
        self.loop.optimizer.zero_grad(set_to_none=True)
        cool(self.loop.policy)
        return float(norm)

    def _rows(self) -> list[Row]:
        """The recorded completions as a rollout of the policy's own, made into rows as the stage makes them."""
        made = self.made
        no = np.zeros(self.new, np.float32)
        done = [Completion(ids, False, None, no, no) for completions in self.recorded for ids in completions]
        texts = [text_of(c, made.sampler.tokenizer) for c in done]
        total, each = made.rewarded(self.asked, done, texts)
        rollout = Rollout([self.asked], done, texts, total, each, np.zeros(len(done)), {})
        rollout.columns["sampled"] = np.zeros(len(done) * self.new, np.float32)
        rollout.columns["sampled"] = made._score(rollout, self.loop.policy)
        assert made.reference is not None
        rollout.columns["reference"] = made._score(rollout, made.reference)
        made._judge(0, rollout, np.zeros(len(done) * self.new))
        return made.packed(made._trees(rollout)[0])
