"""The reward–KL front: models between a start and a merge, each measured on held-out prompts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from temper import hub, statistics
from temper import recipe as recipes
from temper.engine import device as devices
from temper.errors import TrainingError
from temper.job import Job, Log
from temper.models import adapters, folders, load
from temper.models.scores import Policy
from temper.recipe import Recipe
from temper.runfolder import RunFolder, read_sealed, write_sealed
from temper.stages.rl import Rl
from temper.stages.rollout import text_of
from temper.stages.scoring import divergence
from temper.stages.training import read_split
from temper.types import Record, Scores


def front(
    job: Job, stage: Rl, start: Path, end: Path, etas: Sequence[float], *, prompts: int, completions: int = 1
) -> dict[str, Any]:
    """Reward and KL(model ‖ start) of (1 − η)·start + η·end for each η, as `front.json` has them.

    The models answer the first prompts of the stage's split validation, as they answer in training: same decoding, same
    rewards, and the same noise for every η. The KL is exact in every token (the whole vocabulary), summed over the
    answer, in nats. Intervals are bootstrap intervals over prompts. Points that are measured are kept in `front/`.

    Args:
        stage: says how is answered and what is rewarded; `rl`, `warp`, or any stage of their kind.
        start, end: folders of whole models with a tokenizer.
        completions: answers of each prompt; a prompt counts with their means.
    """
    records = read_split(job, stage.data.partition(".")[0], "validation")[:prompts]
    opened: list[Policy] = []  # the start, once a point needs it
    points = []
    for eta in etas:
        kept = job.dir / "front" / f"{eta:g}.json"
        found = read_sealed(kept)
        if found is None:
            kept.parent.mkdir(exist_ok=True)
            reward, kl = _measured(job, stage, start, end, eta, records, completions, opened)
            found = {"reward": reward.tolist(), "kl": kl.tolist()}
            write_sealed(kept, found)
        point = {axis: _mean(np.array(found[name]), job.seed) for axis, name in (("x", "kl"), ("y", "reward"))}
        points.append({"label": f"η = {eta:g}", "setting": {"liti": eta}, **point})
        job.say(f"η = {eta:g}: reward {point['y']['value']:.3f}, KL to the start {point['x']['value']:.3g} nats")
    return {"x": "kl", "y": "reward_mean", "points": points}


def reopened(recipe: Recipe, run: Path, name: str, folder: Path) -> Job:
    """A job like the one that made a finished stage of a run, in another folder: for a script that measures more of it.

    Args:
        folder: where `front` keeps its points; one for each pair of start and end.
    """
    target = RunFolder(run)
    inputs = {n: found for n in recipes.dependencies(recipe, name) if (found := target.peek(n))}
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(recipe, name, folder, inputs, Log(None))
    job.start_clock()
    return job


def _measured(
    job: Job, stage: Rl, start: Path, end: Path, eta: float, records: list[Record], k: int, opened: list[Policy]
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards, KL) of the model at η, means over the answers of each prompt [N]."""
    part = job.part("front", job.seed)
    between = part.dir / "model"
    shutil.rmtree(between, ignore_errors=True)
    if 0 < eta < 1:
        folders.interpolate(start, end, between, eta)
        load.tokenizer(hub.Source(str(start)), trust_remote_code=job.recipe.trust_remote_code).save_pretrained(between)
    folder = start if eta == 0 else end if eta == 1 else between
    asked = {"model": str(folder), "adapter": None, "completions": k, "kl": stage.kl.model_copy(update={"beta": 0.0})}
    experience, _, _ = stage.model_copy(update=asked).practice(part, records)
    policy, precision, prompts = experience.policy, experience.precision, experience.prompts
    policy.eval()
    with job.progress(len(prompts) * k, f"front, η = {eta:g}") as bar, devices.autocast(policy.device, precision):
        groups = experience.sampler.sample(
            [p.ids for p in prompts], stage.decoding, completions=k, seed=job.seed, step=0,
            numbers=list(range(len(prompts))), progress=bar,
        )  # fmt: skip
    done = [c for group in groups for c in group]
    texts = [text_of(c, experience.sampler.tokenizer) for c in done]
    reward, _ = experience.rewarded(list(range(len(prompts))), done, texts)
    if not opened:
        hf, _ = adapters.open_model(
            hub.Source(str(start)), attention=stage.attention, device=policy.device,
            trust_remote_code=job.recipe.trust_remote_code,
        )  # fmt: skip
        opened.append(Policy(hf))
        opened[0].temperature = policy.temperature
    tokenizer = experience.sampler.tokenizer
    asked_ids = [p.ids for p in prompts for _ in range(k)]
    kl = divergence(policy, (opened[0], tokenizer), tokenizer, asked_ids, done, precision, stage.micro_tokens)
    shutil.rmtree(between, ignore_errors=True)
    return _by_prompt(reward, k), _by_prompt(np.array(kl), k)


def _by_prompt(values: np.ndarray, k: int) -> np.ndarray:
    """Means of k answers each; nan where none of them has a value."""
    groups = values.reshape(-1, k)
    there = ~np.isnan(groups)
    return np.where(there.any(1), np.where(there, groups, 0).sum(1) / np.maximum(there.sum(1), 1), np.nan)


def _mean(rows: np.ndarray, seed: int) -> dict[str, Any]:
    rows = rows[~np.isnan(rows)]
    if not len(rows):
        raise TrainingError("no answer of the front has a reward", do="look at what the rewards give for these prompts")
    scores = Scores.mean(rows, "front")
    low, high = statistics.interval(scores, seed=seed) or (None, None)
    return {"value": scores.value, "low": low, "high": high, "n": len(rows)}
