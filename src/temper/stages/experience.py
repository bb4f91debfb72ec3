"""What a policy wrote, what it was worth, and what a loss needs to know of it: rollouts as a source of rows.

A rollout is `steps` batches of prompts, k completions of each, drawn from the policy as it is when the first of its
batches is asked for. It is written to disk before anything is trained on it: a run that is killed between two updates
of one rollout goes on with the same samples, which its later weights could not draw again.

Legend: P prompts of a rollout, k completions of each, N = P·k; S scored tokens (a completion with its end token).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from temper import rewards
from temper.engine.batches import Pass, chosen
from temper.engine.device import autocast
from temper.engine.processes import Wrapped
from temper.job import Job
from temper.losses import divergence
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.rollouts.decoding import Completion
from temper.rollouts.sampler import Sampler
from temper.runfolder import write_atomic
from temper.stages.handover import Handover
from temper.stages.rollout import Plan, Prompt, Rollout, cuts, packed, text_of, unpacked, until
from temper.stages.watch import Watch
from temper.trees import Node, Row, Tree, flatten, rows_of, split


class Experience:
    """A `Source` of rows for the loop."""

    def __init__(
        self,
        job: Job,
        policy: Policy,
        sampler: Sampler | Handover,
        prompts: Sequence[Prompt],
        plan: Plan,
        parts: Sequence[rewards.Part],
        toxicity: Callable[[Sequence[str]], np.ndarray] | None,
        reference: Reference | None,
        precision: str,
    ) -> None:
        self.job, self.policy, self.sampler, self.prompts, self.plan = job, policy, sampler, prompts, plan
        self.parts, self.toxicity, self.reference, self.precision = parts, toxicity, reference, precision
        self.scores: Callable[[Sequence[str]], np.ndarray] | None = None  # a reward model's, where there is one
        self.seed = plan.seed
        self.folder = job.kept / "rollouts"
        self.wrapped: Wrapped | None = None  # where several processes train
        self.current: tuple[int, list[list[Tree]]] | None = None  # number of the rollout, trees of its batches
        self.watch = Watch(job, plan)

    def close(self) -> None:
        """Leave the server that sampled, if one did."""
        if isinstance(self.sampler, Handover):
            self.sampler.close()

    @property
    def cycle(self) -> int:
        """Optimiser steps that one rollout serves."""
        return self.plan.steps * self.plan.iterations

    @property
    def per_epoch(self) -> int:
        return -(-len(self.prompts) // self.plan.prompts) * self.plan.iterations

    def prepared(self, passes: Sequence[Pass]) -> list[Pass]:
        return list(passes)

    def ready(self, step: int) -> bool:
        number, within = divmod(step, self.cycle)
        return self._read(number) is not None or (within == 0 and self._past(number) is not None)

    def rows(self, step: int) -> list[Row]:
        number, within = divmod(step, self.cycle)
        if self.current is None or self.current[0] != number:
            batches = self._trees(self._collect(number, first=within == 0))
            if number == 0:  # a first step without a gradient would stop the run: a batch that teaches goes before
                first = next((k for k, batch in enumerate(batches) if _teaches(batch)), 0)
                batches.insert(0, batches.pop(first))
            self.current = (number, batches)
            self.job.world.told(lambda: self._forget(number))
        return self.packed(self.current[1][within % self.plan.steps])

    def packed(self, trees: list[Tree]) -> list[Row]:
        """One update's prompts as rows. What is longer than two passes is cut: each part repeats the prompt."""
        parts = [part for tree in trees for part in split(tree, 2 * self.plan.micro_tokens)]
        return rows_of(parts, self.policy.lane(self.plan.row_tokens), self.plan.micro_tokens)

    def trial(self) -> tuple[float, list[Row]]:
        """One prompt's group as rows to time an update with, and the seconds that a prompt's rollout takes.

        As many prompts are answered as are decoded together: a row alone takes nearly as long as sixty.
        """
        together = min(self.plan.prompts, len(self.prompts), max(1, self.sampler.slots // self.plan.completions))
        began = time.perf_counter()
        rollout = self._sample(-1, [[n] for n in range(together)])
        took = (time.perf_counter() - began) / together
        advantage = np.ones(len(rollout.done))
        trees = self._trees(dataclasses.replace(rollout, advantage=advantage))[0]
        return took, rows_of(trees, self.policy.lane(self.plan.row_tokens), self.plan.micro_tokens)

    # Making a rollout

    def _collect(self, number: int, *, first: bool) -> Rollout:
        self.job.world.told(lambda: None)  # whatever the main process wrote or took away is done
        kept = self._read(number)
        rollout = kept if kept is not None else self._sample(number, self._chosen(number))
        if kept is None:
            self.job.world.told(lambda: self._write(number, rollout))
        if first:  # a run that goes on in the middle of a rollout has told of it before
            self.watch.log(number * self.cycle + 1, rollout, self.prompts)
            self.watch.check(number, rollout)
        return rollout

    def _chosen(self, number: int) -> list[list[int]]:
        """Indices of a rollout's prompts, batch by batch; that at the end of an epoch may be shorter."""
        p, n = self.plan, len(self.prompts)
        return [chosen(number * p.steps + k, n, p.prompts, p.seed) for k in range(p.steps)]

    def _sample(self, number: int, batches: list[list[int]]) -> Rollout:
        p, wanted = self.plan, [i for batch in batches for i in batch]
        done, texts, total, each = self._written(number, wanted)
        rollout = Rollout(batches, done, texts, total, each, np.zeros(len(done)), {})
        rollout.columns = {"sampled": np.concatenate([c.logps for c in done]).astype(np.float32)}
        if self.reference is not None:
            drawn = self._drawn(number, wanted) if p.kl_one else None
            rollout.columns["reference"] = self._score(rollout, self.reference, only=drawn)
            if drawn is not None:  # it stands for all k, so that the mean stays the same
                rollout.columns["drawn"] = np.repeat(drawn * p.completions, [len(c.scored) for c in done]).astype(
                    np.float32
                )
        if isinstance(self.sampler, Handover):
            self.sampler.compared(rollout, functools.partial(self._score, rollout))
        elif self.cycle > 1 or p.reward_beta:
            rollout.columns["old"] = self._score(rollout, self.policy)
        spent = np.zeros(len(rollout.columns["sampled"]))
        if p.reward_beta:
            old, reference = (torch.from_numpy(rollout.columns[name]) for name in ("old", "reference"))
            kl = divergence(old, reference, "k1").numpy()
            spent = p.reward_beta * kl.astype(np.float64) * rollout.columns.get("drawn", 1.0)
            total -= np.array([part.sum() for part in np.split(spent, cuts(done))])
        if self.cycle == 1:
            rollout.columns.pop("old", None)  # the ratio is 1: the update's own pass gives the same numbers
        self._judge(number, rollout, spent)
        return rollout

    def _written(
        self, number: int, wanted: list[int]
    ) -> tuple[list[Completion], list[str], np.ndarray, dict[str, np.ndarray]]:
        """Completions of prompts and what they are worth. Each process answers a share of the prompts and rewards what it wrote;
        the noise belongs to the prompt, so it is what one process would have written."""
        p, world, numbers = self.plan, self.job.world, self._numbers(wanted)
        mine = range(world.rank, len(wanted), world.size)
        self.policy.eval()
        told = f"rollout {number + 1}"
        with self.job.progress(len(mine) * p.completions, told) as bar, self._autocast(), self._inference():
            groups = self.sampler.sample(
                [self.prompts[wanted[n]].ids for n in mine], p.decoding, completions=p.completions, seed=p.seed,
                step=number + 1, numbers=[numbers[n] for n in mine], progress=bar,
            )  # fmt: skip
        done = [c for group in groups for c in group]
        texts = [text_of(c, self.sampler.tokenizer) for c in done]
        total, each = self.rewarded([wanted[n] for n in mine], done, texts) if mine else (np.zeros(0), {})
        if world.size == 1:
            return done, texts, total, each
        parts = world.gathered((done, texts, total, each))
        k = p.completions
        place = [(n % world.size, n // world.size * k + j) for n in range(len(wanted)) for j in range(k)]
        names = list(parts[0][3])
        return (
            [parts[r][0][i] for r, i in place], [parts[r][1][i] for r, i in place], np.array([parts[r][2][i] for r, i in place]),
            {name: np.array([parts[r][3][name][i] for r, i in place]) for name in names},
        )  # fmt: skip

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Within, the sampler has a model with all its weights in one place."""
        if self.wrapped is None or not self.wrapped.spread:
            yield
            return
        with self.wrapped.inference() as hf, self.sampler.reading(hf):
            yield

    def _judge(self, number: int, rollout: Rollout, spent: np.ndarray) -> None:
        """Advantages. `spent` [S]: what each token's KL takes from the reward."""
        past = self._past(number)
        assert past is not None  # `ready` goes back to before a rollout whose forerunner is gone
        rewards_P_k = rollout.total.reshape(-1, self.plan.completions)
        baseline = self.plan.advantages(rewards_P_k, float(past[0] / past[1]) if past[1] else np.nan)
        rollout.advantage = baseline.advantage(rewards_P_k).reshape(-1)
        rollout.past = past + np.array([np.nansum(rollout.total), (~np.isnan(rollout.total)).sum()])
        if self.plan.reward_beta and self.plan.kl_level == "token":
            # the KL before a token is no consequence of it: what is left is the return from there on
            lengths = [len(c.scored) for c in rollout.done]
            unit = np.repeat(baseline.spread.reshape(-1), lengths)
            rollout.columns["relief"] = np.nan_to_num(until(spent, rollout.done) / unit).astype(np.float32)

    def _past(self, number: int) -> np.ndarray | None:
        """Sum and number of the rewards before a rollout; None if they are needed and gone."""
        if self.plan.compares != "past" or number <= 0:
            return np.zeros(2)
        kept = self._read(number - 1)
        return None if kept is None else kept.past

    def _drawn(self, number: int, wanted: list[int]) -> np.ndarray:
        """Which completion of each prompt the KL is measured on: bool [N], a function of seed, rollout and prompt."""
        k, seed = self.plan.completions, self.seed
        place = [int(np.random.default_rng([seed, number + 1, n]).integers(k)) for n in self._numbers(wanted)]
        return (np.arange(k) == np.array(place)[:, None]).reshape(-1)

    def _numbers(self, wanted: list[int]) -> list[int]:
        """A number of its own for each prompt's noise: one that a rollout meets twice is answered anew."""
        return [i + len(self.prompts) * wanted[:k].count(i) for k, i in enumerate(wanted)]

    def rewarded(
        self, wanted: list[int], done: list[Completion], texts: list[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        asked = [self.prompts[i] for i in wanted for _ in range(self.plan.completions)]
        given = rewards.Given(
            [a.text for a in asked], texts, [a.reference for a in asked], [a.record for a in asked],
            [c.ids for c in done], self.toxicity, self._wholes(asked, done), self.scores,
        )  # fmt: skip
        return rewards.compute(self.parts, given)

    def _wholes(self, asked: list[Prompt], done: list[Completion]) -> list[str]:
        """Prompt and completion as one text."""
        ids = [[*a.ids, *c.ids] for a, c in zip(asked, done, strict=True)]
        return self.sampler.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _score(
        self, rollout: Rollout, model: Callable[[Row], torch.Tensor], *, only: np.ndarray | None = None
    ) -> np.ndarray:
        """Log-probabilities of all scored tokens by the trainer's own pass [S], dropout off.

        Args:
            only: the completions [N] that are passed; of others the log-probability in sampling is given.
        """
        some = dataclasses.replace(rollout, columns={})
        trees = [t for batch in self._trees(some, every=True, only=only) for t in batch]
        place = {id(t): k for k, t in enumerate(trees)}
        own: dict[int, np.ndarray] = {}
        self.policy.eval()
        rows = rows_of(trees, self.policy.lane(self.plan.row_tokens), self.plan.micro_tokens)
        with torch.no_grad(), self._autocast():
            for row, counts in self.wrapped.passes(rows) if self.wrapped else [(row, True) for row in rows]:
                found = model(row.to(self.policy.device)).float().cpu().numpy()
                ends = np.cumsum([len(t.tgt) for t in row.trees])
                if counts:
                    own |= {place[id(t)]: part for t, part in zip(row.trees, np.split(found, ends[:-1]), strict=True)}
        every = functools.reduce(operator.or_, self.job.world.gathered(own))
        out = [every[k] for k in range(len(trees))]
        whole = rollout.columns["sampled"].copy()
        passed = np.ones(len(rollout.done), bool) if only is None else only
        whole[np.repeat(passed, [len(c.scored) for c in rollout.done])] = np.concatenate(out)
        return whole

    def _autocast(self) -> Any:
        return autocast(self.policy.device, self.precision)

    # Rollout → trees

    def _trees(self, rollout: Rollout, *, every: bool = False, only: np.ndarray | None = None) -> list[list[Tree]]:
        """One tree a prompt, in the batches that the optimiser steps take.

        Args:
            every: completions that are masked score too.
            only: the completions [N] that the trees hold; None: all.
        """
        k = self.plan.completions
        counted = [every or self._counts(rollout, n) for n in range(len(rollout.done))]
        edges = np.cumsum([0, *(len(batch) for batch in rollout.batches)])
        for low, high in itertools.pairwise((edges * k).tolist()):
            if not any(counted[low:high]):  # a step needs something: advantages of 0, so only a KL acts
                counted[low:high] = [True] * (high - low)
        ends = np.cumsum([len(c.scored) for c in rollout.done])
        trees = []
        for p, index in enumerate(rollout.prompts):
            nodes, columns = [], []
            for n in range(p * k, p * k + k):
                if only is not None and not only[n]:
                    continue
                ids = rollout.done[n].scored
                weight = 1.0 if self.plan.token_weights else 1 / max(1, len(ids))
                nodes.append(Node(ids, [weight * counted[n]] * len(ids)))
                if counted[n]:
                    columns.append(self._columns(rollout, n, slice(ends[n] - len(ids), ends[n])))
            prompt = self.prompts[index]
            tree = flatten(Node(prompt.ids, None, tuple(nodes)), prompt.record.where)
            names = self._columns(rollout, 0, slice(0, 0))
            extra = {name: np.concatenate([names[name], *(c[name] for c in columns)]) for name in names}
            trees.append(dataclasses.replace(tree, extra=extra))
        return [trees[low:high] for low, high in itertools.pairwise(edges.tolist())]

    def _columns(self, rollout: Rollout, n: int, tokens: slice) -> dict[str, np.ndarray]:
        """What a loss reads beside the tokens of one completion, float32 each."""
        found = {name: values[tokens] for name, values in rollout.columns.items()}
        trained = float(self._counts(rollout, n))  # a masked one may score, and has no advantage
        advantage = rollout.advantage[n] + found.pop("relief", np.zeros(tokens.stop - tokens.start))
        return {
            **found,
            "advantage": (trained * advantage).astype(np.float32),
            "completion": np.full(tokens.stop - tokens.start, n, np.float32),
        }

    def _counts(self, rollout: Rollout, n: int) -> bool:
        return not (np.isnan(rollout.total[n]) or (self.plan.mask_cut and not rollout.done[n].ended))

    # Disk

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.rollout"

    def _write(self, number: int, rollout: Rollout) -> None:
        self.folder.mkdir(exist_ok=True)
        write_atomic(self._file(number), packed(rollout))

    def _read(self, number: int) -> Rollout | None:
        with contextlib.suppress(OSError):
            return unpacked(self._file(number).read_bytes(), self._chosen(number))
        return None

    def _forget(self, number: int) -> None:
        """Rollouts that no kept checkpoint is in the middle of."""
        steps = [int(p.name.split("-")[1]) for p in (self.job.kept / "checkpoints").glob("step-*")]
        oldest = min([*(s // self.cycle for s in steps), number])
        oldest -= self.plan.compares == "past"  # the next one's baseline stands in it
        for file in self.folder.glob("*.rollout"):
            if int(file.stem) < oldest:
                file.unlink()


def _teaches(batch: list[Tree]) -> bool:
    """Whether any token of a batch has an advantage; where all completions of each prompt were worth the same, none has."""
    return any(tree.extra["advantage"].any() for tree in batch)
