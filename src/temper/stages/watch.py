"""What is told of rollouts: lines in the logs, and what would end well and leave a policy that learnt nothing, or one trick."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.advantages import without_variance
from temper.engine import loop
from temper.errors import TrainingError
from temper.job import Job
from temper.metrics.diversity import collapsing, variety_of
from temper.stages.rollout import Plan, Prompt, Rollout, mean

PATIENCE = 10  # rollouts in a row in which no group has any variance


class Watch:
    """Looks at each rollout once, when it is first trained on."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self.job, self.plan = job, plan
        self.log_file = job.dir / "metrics.jsonl"
        self.barren = 0
        self.latest: list[dict[str, Any]] | None = None  # lines on the latest rollouts

    def log(self, step: int, r: Rollout, prompts: Sequence[Prompt]) -> None:
        """A line into metrics.jsonl, a few completions into samples.jsonl. `step`: the first that it serves."""
        groups = self._groups(r)
        line = {
            "step": step,
            "reward": mean(r.total),
            **{f"reward_{name}": mean(values) for name, values in r.each.items()},
            "reward_std": mean(np.nanstd(groups, axis=1)) if not np.isnan(groups).all(axis=1).any() else None,
            "length": float(np.mean([len(c.ids) for c in r.done])),
            "cut": float(np.mean([not c.ended for c in r.done])),
            "entropy": float(-r.columns["sampled"].mean()),
            **variety_of(r.texts),
        }
        if self.plan.compares == "group":
            line["groups_without_variance"] = float(without_variance(groups).mean())
        if self.plan.reward_beta:  # where the KL is in the loss, each step logs its own
            kl = (r.columns["sampled"] - r.columns["reference"]) * r.columns.get("drawn", 1.0)
            line["kl"] = float(kl.mean())
        if r.engine is not None:
            line |= {name: None if np.isnan(x) else float(x) for name, x in zip(("engine_gap", "engine_lag"), r.engine, strict=True)}
        self._compare(line)
        loop.append(self.log_file, line)
        for n in range(0, len(r.done), self.plan.completions)[: self.plan.samples]:
            asked = prompts[r.prompts[n // self.plan.completions]]
            loop.append(
                self.job.dir / "samples.jsonl",
                {"step": step, "prompt": asked.text, "completion": r.texts[n], "reference": asked.reference,
                 "reward": None if np.isnan(r.total[n]) else round(float(r.total[n]), 4)},
            )  # fmt: skip

    def check(self, number: int, r: Rollout) -> None:
        """Completions all cut; rewards that say nothing.

        Raises:
            TrainingError: nothing to learn in the first rollout, or in many in a row.
        """
        groups = self._groups(r)
        limit, cut = self.plan.decoding.max_new_tokens, all(not c.ended for c in r.done)
        if cut:
            self.job.warn(
                f"there are rollouts all of whose completions were cut by max_new_tokens ({limit}): "
                + ("mask_cut trains on none of them" if self.plan.mask_cut else "rewards judge half sentences")
                + ", and the policy never learns to stop"
            )
        # one completion, compared with earlier ones, says something by itself
        same = groups.size > 1 and bool(without_variance(groups).all())
        masked = cut and self.plan.mask_cut
        self.barren = self.barren + 1 if same or masked else 0
        if self.barren and (number == 0 or self.barren >= PATIENCE):
            which = "the first rollout" if number == 0 else f"{self.barren} rollouts in a row"
            why, do = _barren(r, limit if masked else None)
            raise TrainingError(f"in {which} {why}: nothing would be learnt", where="«" + r.texts[0][:120] + "»", do=do)

    def _groups(self, r: Rollout) -> np.ndarray:
        """Rewards in the groups that are compared: each prompt's, or all of a rollout."""
        return r.total.reshape((-1, self.plan.completions) if self.plan.compares == "group" else (1, -1))

    def _compare(self, line: dict[str, Any]) -> None:
        """Warns where rewards rise and variety falls."""
        c = self.plan.collapse
        if self.latest is None:  # a run that goes on has the lines of its rollouts in the log
            self.latest = [x for x in _lines(self.log_file) if "reward" in x and x["step"] < line["step"]]
        self.latest = [*self.latest, line][-c.rollouts :] if c.rollouts else []
        if c.rollouts and len(self.latest) == c.rollouts:
            found = collapsing(self.latest, distinct_2=c.distinct_2, variety=c.variety)
            if found:
                self.job.warn(found)


def _barren(r: Rollout, limit: int | None) -> tuple[str, str]:
    """Why a rollout teaches nothing, and what to do. `limit`: of new tokens, where it cut all that was to be trained on."""
    if np.isnan(r.total).all():
        return "no completion had a reward", "a reward that gives numbers: each one gave None for all of them"
    if limit is not None:
        return (
            f"max_new_tokens ({limit}) cut all completions, and mask_cut trains on none of these",
            "a larger decoding.max_new_tokens, or mask_cut: false",
        )
    return (
        f"all completions of every prompt had the same reward ({mean(r.total)}), so that every advantage is 0",
        "look at samples.jsonl; a reward that tells answers apart, a higher temperature, more completions",
    )


def _lines(file: Any) -> list[dict[str, Any]]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return found
