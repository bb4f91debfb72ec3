"""What a policy wrote, what it was worth, and what a loss needs to know of it: rollouts as a source of rows.

A rollout is `steps` batches of prompts, k completions of each, drawn from the policy as it is when the first of its
batches is asked for. It is written to disk before anything is trained on it: a run that is killed between two updates
of one rollout goes on with the same samples, which its later weights could not draw again.

Legend: P prompts of a rollout, k completions of each, N = P·k; S scored tokens (a completion with its end token).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from temper import rewards
from temper.advantages import without_variance
from temper.engine import loop
from temper.engine.batches import chosen
from temper.engine.device import autocast
from temper.errors import TrainingError
from temper.job import Job
from temper.losses.policy import divergence
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.rollouts.decoding import Completion, Decoding
from temper.rollouts.sampler import Sampler
from temper.runfolder import write_atomic
from temper.stages.rollout import Rollout, cuts, mean, packed, scored, text_of, unpacked
from temper.trees import Node, Row, Tree, flatten, rows_of, split
from temper.types import Record

PATIENCE = 10  # rollouts in a row in which no group has any variance


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row as the policy is asked it."""

    record: Record
    ids: list[int]
    text: str
    reference: str  # its answer, "" where it has none


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rollouts are made and used."""

    prompts: int  # of one optimiser step
    completions: int  # of one prompt: k
    steps: int  # batches of prompts in a rollout
    iterations: int  # passes over a rollout
    row_tokens: int
    micro_tokens: int
    decoding: Decoding
    advantages: Callable[[np.ndarray], np.ndarray]  # rewards [P, k] → [P, k]
    average: str  # sequence: every completion counts alike; token: every token does
    mask_cut: bool  # completions cut by the limit are not trained on
    reward_beta: float  # of the KL term in the reward, 0: none there
    seed: int
    samples: int  # completions shown of a rollout


class Experience:
    """A `Source` of rows for the loop."""

    def __init__(
        self,
        job: Job,
        policy: Policy,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        plan: Plan,
        parts: Sequence[rewards.Part],
        toxicity: Callable[[Sequence[str]], np.ndarray] | None,
        reference: Reference | None,
        precision: str,
    ) -> None:
        self.job, self.policy, self.sampler, self.prompts, self.plan = job, policy, sampler, prompts, plan
        self.parts, self.toxicity, self.reference, self.precision = parts, toxicity, reference, precision
        self.seed = plan.seed
        self.folder = job.dir / "rollouts"
        self.current: tuple[int, list[list[Tree]]] | None = None  # number of the rollout, trees of its batches
        self.barren = 0

    @property
    def cycle(self) -> int:
        """Optimiser steps that one rollout serves."""
        return self.plan.steps * self.plan.iterations

    @property
    def per_epoch(self) -> int:
        return -(-len(self.prompts) // self.plan.prompts) * self.plan.iterations

    def ready(self, step: int) -> bool:
        number, within = divmod(step, self.cycle)
        return within == 0 or self._read(number) is not None

    def rows(self, step: int) -> list[Row]:
        number, within = divmod(step, self.cycle)
        if self.current is None or self.current[0] != number:
            self.current = (number, self._trees(self._collect(number, first=within == 0)))
            self._forget(number)
        trees = self.current[1][within % self.plan.steps]
        parts = [part for tree in trees for part in split(tree, self.plan.micro_tokens)]
        return rows_of(parts, self.plan.row_tokens, self.plan.micro_tokens)

    def trial(self) -> tuple[float, list[Row]]:
        """One prompt's group as rows to time an update with, and the seconds that a prompt's rollout takes."""
        began = time.perf_counter()
        rollout = self._sample(-1, [[0]])
        took = time.perf_counter() - began
        advantage = np.ones(len(rollout.done))
        [trees] = self._trees(dataclasses.replace(rollout, advantage=advantage))
        return took, rows_of(trees, self.plan.row_tokens, self.plan.micro_tokens)

    # Making a rollout

    def _collect(self, number: int, *, first: bool) -> Rollout:
        kept = self._read(number)
        rollout = kept if kept is not None else self._sample(number, self._chosen(number))
        if kept is None:
            self.folder.mkdir(exist_ok=True)
            write_atomic(self._file(number), packed(rollout))
        if first:  # a run that goes on in the middle of a rollout has told of it before
            self._log(number, rollout)
            self._check(number, rollout)
        return rollout

    def _chosen(self, number: int) -> list[list[int]]:
        """Indices of a rollout's prompts, batch by batch; that at the end of an epoch may be shorter."""
        p, n = self.plan, len(self.prompts)
        return [chosen(number * p.steps + k, n, p.prompts, p.seed) for k in range(p.steps)]

    def _sample(self, number: int, batches: list[list[int]]) -> Rollout:
        p, wanted = self.plan, [i for batch in batches for i in batch]
        self.policy.eval()
        with self.job.progress(len(wanted) * p.completions, f"rollout {number + 1}") as bar, self._autocast():
            groups = self.sampler.sample(
                [self.prompts[i].ids for i in wanted], p.decoding, completions=p.completions, seed=p.seed,
                step=number + 1, numbers=self._numbers(wanted), progress=bar,
            )  # fmt: skip
        done = [c for group in groups for c in group]
        texts = [text_of(c, self.sampler.tokenizer) for c in done]
        total, each = self._rewards(wanted, done, texts)
        rollout = Rollout(batches, done, texts, total, each, np.zeros(len(done)), {})
        rollout.columns = {"sampled": np.concatenate([c.logps for c in done]).astype(np.float32)}
        if self.reference is not None:
            rollout.columns["reference"] = self._score(rollout, self.reference)
        if self.cycle > 1 or p.reward_beta:
            rollout.columns["old"] = self._score(rollout, self.policy)
        if p.reward_beta:
            kl = divergence(*(torch.from_numpy(rollout.columns[c]) for c in ("old", "reference")), "k1").numpy()
            total -= p.reward_beta * np.array([part.sum() for part in np.split(kl, cuts(done))])
        if self.cycle == 1:
            rollout.columns.pop("old", None)  # the ratio is 1: the update's own pass gives the same numbers
        rollout.advantage = p.advantages(total.reshape(-1, p.completions)).reshape(-1)
        return rollout

    def _numbers(self, wanted: list[int]) -> list[int]:
        """A number of its own for each prompt's noise: one that a rollout meets twice is answered anew."""
        return [i + len(self.prompts) * wanted[:k].count(i) for k, i in enumerate(wanted)]

    def _rewards(
        self, wanted: list[int], done: list[Completion], texts: list[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        asked = [self.prompts[i] for i in wanted for _ in range(self.plan.completions)]
        given = rewards.Given(
            [a.text for a in asked], texts, [a.reference for a in asked], [a.record for a in asked],
            [c.ids for c in done], self.toxicity,
        )  # fmt: skip
        return rewards.compute(self.parts, given)

    def _score(self, rollout: Rollout, model: Callable[[Row], torch.Tensor]) -> np.ndarray:
        """Log-probabilities of all scored tokens by the trainer's own pass [S], dropout off."""
        trees = [t for batch in self._trees(dataclasses.replace(rollout, columns={}), every=True) for t in batch]
        place = {id(t): k for k, t in enumerate(trees)}
        out: list[np.ndarray] = [np.zeros(0)] * len(trees)
        self.policy.eval()
        with torch.no_grad(), self._autocast():
            for row in rows_of(trees, self.plan.row_tokens, self.plan.micro_tokens):
                found = model(row.to(self.policy.device)).float().cpu().numpy()
                ends = np.cumsum([len(t.tgt) for t in row.trees])
                for tree, part in zip(row.trees, np.split(found, ends[:-1]), strict=True):
                    out[place[id(tree)]] = part
        return np.concatenate(out).astype(np.float32)

    def _autocast(self) -> Any:
        return autocast(self.policy.device, self.precision)

    # Rollout → trees

    def _trees(self, rollout: Rollout, *, every: bool = False) -> list[list[Tree]]:
        """One tree a prompt, in the batches that the optimiser steps take. `every`: masked completions score too."""
        k = self.plan.completions
        counted = [every or self._counts(rollout, n) for n in range(len(rollout.done))]
        edges = np.cumsum([0, *(len(batch) for batch in rollout.batches)])
        for low, high in itertools.pairwise((edges * k).tolist()):
            if not any(counted[low:high]):  # a step needs something: advantages of 0, so only a KL acts
                counted[low:high] = [True] * (high - low)
        advantage = np.where([self._counts(rollout, n) for n in range(len(counted))], rollout.advantage, 0.0)
        ends = np.cumsum([len(scored(c)) for c in rollout.done])
        trees = []
        for p, index in enumerate(rollout.prompts):
            nodes, extra = [], {name: [np.zeros(0, np.float32)] for name in ("advantage", *rollout.columns)}
            for n in range(p * k, p * k + k):
                ids = scored(rollout.done[n])
                weight = 1 / max(1, len(ids)) if self.plan.average == "sequence" else 1.0
                nodes.append(Node(ids, [weight * counted[n]] * len(ids)))
                if counted[n]:
                    extra["advantage"].append(np.full(len(ids), advantage[n], np.float32))
                    for name, values in rollout.columns.items():
                        extra[name].append(values[ends[n] - len(ids) : ends[n]])
            prompt = self.prompts[index]
            tree = flatten(Node(prompt.ids, None, tuple(nodes)), prompt.record.where)
            trees.append(dataclasses.replace(tree, extra={name: np.concatenate(v) for name, v in extra.items()}))
        return [trees[low:high] for low, high in itertools.pairwise(edges.tolist())]

    def _counts(self, rollout: Rollout, n: int) -> bool:
        return not (np.isnan(rollout.total[n]) or (self.plan.mask_cut and not rollout.done[n].ended))

    # Disk

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.rollout"

    def _read(self, number: int) -> Rollout | None:
        with contextlib.suppress(OSError):
            return unpacked(self._file(number).read_bytes(), self._chosen(number))
        return None

    def _forget(self, number: int) -> None:
        """Rollouts that no kept checkpoint is in the middle of."""
        steps = [int(p.name.split("-")[1]) for p in (self.job.dir / "checkpoints").glob("step-*")]
        oldest = min([*(s // self.cycle for s in steps), number])
        for file in self.folder.glob("*.rollout"):
            if int(file.stem) < oldest:
                file.unlink()

    # What is told

    def _log(self, number: int, r: Rollout) -> None:
        groups = r.total.reshape(-1, self.plan.completions)
        step = number * self.cycle + 1
        line = {
            "step": step,
            "reward": mean(r.total),
            **{f"reward_{name}": mean(values) for name, values in r.each.items()},
            "reward_std": mean(np.nanstd(groups, axis=1)) if not np.isnan(groups).all(axis=1).any() else None,
            "length": float(np.mean([len(c.ids) for c in r.done])),
            "cut": float(np.mean([not c.ended for c in r.done])),
            "entropy": float(-r.columns["sampled"].mean()),
            "groups_without_variance": float(without_variance(groups).mean()),
        }
        if self.plan.reward_beta:  # where the KL is in the loss, each step logs its own
            line["kl"] = float((r.columns["sampled"] - r.columns["reference"]).mean())
        loop.append(self.job.dir / "metrics.jsonl", line)
        for n in range(0, len(r.done), self.plan.completions)[: self.plan.samples]:
            asked = self.prompts[r.prompts[n // self.plan.completions]]
            loop.append(
                self.job.dir / "samples.jsonl",
                {"step": step, "prompt": asked.text, "completion": r.texts[n], "reference": asked.reference,
                 "reward": None if np.isnan(r.total[n]) else round(float(r.total[n]), 4)},
            )  # fmt: skip

    def _check(self, number: int, r: Rollout) -> None:
        groups = r.total.reshape(-1, self.plan.completions)
        if all(not c.ended for c in r.done):
            self.job.warn(
                f"there are rollouts all of whose completions were cut by max_new_tokens ({self.plan.decoding.max_new_tokens}): "
                "rewards judge half sentences, and the policy never learns to stop"
            )
        self.barren = self.barren + 1 if without_variance(groups).all() else 0
        if self.barren and (number == 0 or self.barren >= PATIENCE):
            raise TrainingError(
                f"in {'the first rollout' if number == 0 else f'{self.barren} rollouts in a row'} all completions of every "
                f"prompt had the same reward ({mean(r.total)}): every advantage is 0, and nothing would be learnt",
                where="«" + r.texts[0][:120] + "»",
                do="look at samples.jsonl; a reward that tells answers apart, a higher temperature, more completions",
            )
