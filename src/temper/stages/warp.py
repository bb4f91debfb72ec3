"""warp: policies trained apart from one start and merged, round after round.

θ_0: the model                                       Ramé et al. 2024, "WARP", algorithm 1
each round: M policies from θ_{i−1}, each with its own order of prompts and noise, each held close to the moving
            average of itself (rate μ); the rule's merge of their task vectors: θ_merged;
            θ_i = (1 − η)·θ_{i−1} + η·θ_merged (LITI)
the front:  (1 − η)·θ_0 + η·θ_merged of the last round, for several η

policies/ROUND.POLICY/    checkpoints, rollouts, metrics.jsonl, samples.jsonl; weights/ and their seal, weights.json
starts/N/                 θ_N, sealed by N.json
merged/  model/           θ_merged and θ_I of the last round
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from pydantic import field_validator, model_validator

from temper import hub
from temper.engine import device as devices
from temper.errors import RecipeError
from temper.job import Job
from temper.models import adapters, folders, load
from temper.recipe import Recipe, detail, stages
from temper.runfolder import checksums, damage, read_sealed, write_atomic, write_json, write_sealed
from temper.stages.front import front
from temper.stages.merge import applied, configured, wholes, written
from temper.stages.rl import Kl, Rl
from temper.stages.seen import note_trained_on
from temper.stages.training import read_split


@stages.register("warp")
class Warp(Rl):
    """Train policies apart from one start, merge them, go part of the way back, and begin again from there (WARP)."""

    kind = "warp"
    together = False

    rounds: int = detail(3, "Rounds (I of the paper, which ran 5 and gained nothing after the third).", ge=1)
    policies: int = detail(2, "Policies trained apart in each round (M); max_steps and epochs are of each.", ge=1)
    ema: float = detail(0.01, "Rate μ of the moving average that a policy is held close to.", gt=0, le=1)
    liti: float = detail(0.3, "η: how far from the round's start towards the merge the next one begins.", gt=0, le=1)
    merging: str | dict[str, Any] = detail("slerp", "A name or {name: {option: value}}; see `temper list rules`.")
    front: list[float] = detail(
        [0.0, 0.25, 0.5, 0.75, 1.0], "Measure these η between the very first start and the last merge; []: none."
    )
    front_prompts: int = detail(64, "Prompts of the split validation that the front is measured on.", ge=2)
    algorithm: str | dict[str, Any] = detail("rloo", "A name or {name: {option: value}}; see `temper list algorithms`.")
    kl: Kl = detail(Kl(beta=0.1, place="reward"), "The KL term to the policy's own moving average.")
    merge: bool = detail(True, "Adapters are always folded in: a merge is one of whole weights.")

    @model_validator(mode="before")
    @classmethod
    def _of_paper(cls, value: Any) -> Any:
        """Ramé et al. 2024, section 4: KL in the reward with β = 0.1."""
        if not isinstance(value, dict) or not isinstance(value.get("kl", {}), dict):
            return value
        return {"algorithm": "rloo", **value, "kl": {"beta": 0.1, "place": "reward", **value.get("kl", {})}}

    @field_validator("merging")
    @classmethod
    def _rule(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        configured(value, "merging")
        return value

    @model_validator(mode="after")
    def _several(self) -> Warp:
        if self.policies == 1:
            raise RecipeError(
                "policies: 1 leaves nothing to merge: WARP gains by what policies trained apart have in common",
                where="policies",
                do="policies: 2 or more; the stage rl trains one",
            )
        if self.rollouts.engine != "native":
            raise RecipeError(
                "each policy of warp starts from other whole weights, and a server has one base",
                where="rollouts.engine",
                do="leave rollouts out",
            )
        if not self.merge:
            raise RecipeError("warp gives whole models: its merges are of products", where="merge", do="leave it out")
        if any(not 0 <= eta <= 1 for eta in self.front):
            raise RecipeError(f"front: {self.front} goes beyond 0 to 1", where="front", do="0: the start; 1: the merge")
        return self

    def check(self, recipe: Recipe) -> None:
        data = self.data.partition(".")[0]
        if self.front and getattr(recipe.stages[data], "validation", None) == 0:
            raise RecipeError(
                f"the front is measured on {data}.validation, and {data} has validation: 0",
                do=f"give {data}.validation a share or a number of rows, or front: []",
            )

    def run(self, job: Job) -> None:
        devices.of(job.recipe)
        start = job.dir / "starts" / "0"
        sealed(start, functools.partial(self._first, job))
        notes: list[dict[str, Any]] = []
        for number in range(1, self.rounds + 1):
            policies = [self._policy(job, number, m, start) for m in range(1, self.policies + 1)]
            notes += [note for _, note in policies]
            last = number == self.rounds
            out = job.dir / ("merged" if last else f"starts/{number}")
            make = functools.partial(self._merged, job, start, [s for s, _ in policies], eta=1.0 if last else self.liti)
            told = sealed(out, make, seal=job.dir / "starts" / f"{number}.json")
            job.facts[f"round {number}"] = told["text"]
            job.say(f"round {number}: {told['text']}")
            for warning in told["warnings"]:
                job.warn(warning)
            if last:
                folders.interpolate(start, out, job.dir / "model", self.liti)
                self._tokenizer(job, out).save_pretrained(job.dir / "model")
            start = out
        self._sum_up(job, notes)
        if self.front:
            found = front(
                job, self, job.dir / "starts" / "0", job.dir / "merged", self.front, prompts=self.front_prompts
            )
            write_json(job.dir / "front.json", found)

    def _first(self, job: Job, folder: Path) -> dict[str, Any]:
        """θ_0 as a folder of whole weights, whatever it was given as."""
        written(job, job.model(self.model), folder)
        return {}

    def _policy(self, job: Job, number: int, m: int, start: Path) -> tuple[hub.Source, dict[str, Any]]:
        """One policy of a round: its weights, and what its training noted. What is finished is not done again."""
        seed = int(np.random.SeedSequence([job.seed, number, m]).generate_state(1)[0])
        part = job.part(f"policies/{number}.{m}", seed)
        note = sealed(part.dir / "weights", functools.partial(self._trained, part, (number, m), start))
        for scratch in ("checkpoints", "rollouts"):
            shutil.rmtree(part.dir / scratch, ignore_errors=True)
        write_logs(job, note["counts"]["steps"])
        weights = part.dir / "weights"
        if (weights / "adapter_config.json").is_file():
            return hub.Source(str(start), None, (str(weights),)), note
        return hub.Source(str(weights)), note

    def _trained(self, part: Job, which: tuple[int, int], start: Path, folder: Path) -> dict[str, Any]:
        part.say(f"round {which[0]} of {self.rounds}, policy {which[1]} of {self.policies}")
        one = self.model_copy(update={"model": str(start)})
        t = one.train(part, rate=self.ema, tell=which == (1, 1))
        if isinstance(t.policy.hf, PeftModel):  # kept small; it is folded in where it is merged
            adapters.save(t.policy.hf, folder, t.source, stage=None, identity=hub.identity(t.source), ends=t.ends)
            t.tokenizer.save_pretrained(folder)
        else:
            load.save(t.policy.hf, t.tokenizer, folder, ends=t.ends)
        return {"counts": part.counts, "facts": part.facts, "summary": part.summary}

    def _merged(self, job: Job, start: Path, sources: list[hub.Source], folder: Path, *, eta: float) -> dict[str, Any]:
        """θ_start + η·(merge of the task vectors) into a folder; how the task vectors lay to one another."""
        base, *models = wholes(job, [hub.Source(str(start)), *sources], job.dir / "whole")
        cosine, norms = folders.angles(base, models)
        folders.merge(
            base, models, folder, functools.partial(applied, configured(self.merging, "merging"), None), eta=eta
        )
        self._tokenizer(job, start).save_pretrained(folder)
        shutil.rmtree(job.dir / "whole", ignore_errors=True)  # whole weights need none
        warnings = ["a policy ended where it began: nothing of it is in the merge"] if 0.0 in norms else []
        lengths = ", ".join(f"{n:.3g}" for n in norms)
        text = f"task vectors of norm {lengths}; mean cosine between two {cosine:.3f}"
        return {"text": text, "warnings": warnings}

    def _tokenizer(self, job: Job, folder: Path) -> Any:
        return load.tokenizer(hub.Source(str(folder)), trust_remote_code=job.recipe.trust_remote_code)

    def _sum_up(self, job: Job, notes: list[dict[str, Any]]) -> None:
        """What all policies together took, and what the first one noted."""
        first = notes[0]
        job.facts = {**first["facts"], **job.facts}
        job.counts.update(first["counts"])
        for name in ("steps", "tokens", "trained_tokens"):
            job.counts[name] = sum(n["counts"][name] for n in notes)
        job.summary = f"{self.rounds} rounds of {self.policies} policies, each as the first:\n{first['summary']}"
        job.peak_device_memory = devices.peak_memory(torch.device(first["facts"]["device"].split(" ")[0]))
        note_trained_on(job, read_split(job, self.data, "train"))


def sealed(folder: Path, make: Callable[[Path], dict[str, Any]], *, seal: Path | None = None) -> dict[str, Any]:
    """A folder that is there whole, made if it is not; returns what `make` noted when it made it."""
    seal = seal or folder.with_name(folder.name + ".json")
    found = read_sealed(seal)
    if found is not None and folder.is_dir() and damage(folder, found["files"]) is None:
        return dict(found["note"])
    shutil.rmtree(folder, ignore_errors=True)
    seal.unlink(missing_ok=True)
    seal.parent.mkdir(parents=True, exist_ok=True)
    note = make(folder)
    write_sealed(seal, {"note": note, "files": checksums(folder)})
    return note


def write_logs(job: Job, steps: int) -> None:
    """The logs of the finished policies as the stage's own: which policy each line is of, and steps that go on.

    Policies of a round stand side by side, rounds one after another.
    """
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = itertools.chain.from_iterable(_lines(part, name, steps) for part in _finished(job.dir))
        write_atomic(job.dir / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _finished(folder: Path) -> list[Path]:
    parts = [seal.parent for seal in folder.glob("policies/*/weights.json")]
    return sorted(parts, key=lambda p: tuple(map(int, p.name.split("."))))


def _lines(part: Path, name: str, steps: int) -> Iterator[dict[str, Any]]:
    before = (int(part.name.split(".")[0]) - 1) * steps
    file = part / name
    for text in file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []:
        line = json.loads(text)
        yield {"policy": part.name, **line, "step": before + line["step"]}
