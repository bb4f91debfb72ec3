"""The reference of preference losses: opened, proven to be what it is taken for, or asked once and its answers kept."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from temper import hub
from temper.engine import device as devices
from temper.engine.loop import Loop
from temper.errors import ModelError, RunError, TrainingError
from temper.job import Job
from temper.models import adapters, load
from temper.models.proof import prove
from temper.models.scores import Policy
from temper.runfolder import write_atomic
from temper.stages.training import TrainingStage
from temper.trees import Row, Tree, rows_of

KEPT = "reference.safetensors"
# Mean distance, in nats, between a token's log-probabilities under two models that are one. Dropout of 0.1, or an adapter
# that was trained for a few steps, is beyond it.
SAME = {"float32": 1e-3, "bf16": 0.05, "fp16": 0.05}


class Other:
    """A model of its own as the reference: frozen, without dropout."""

    def __init__(self, hf: Any, layout: str, length: int, precision: str, device: torch.device) -> None:
        hf.requires_grad_(False)
        self.policy = Policy(hf.eval())
        with devices.autocast(device, precision):
            if layout == "padded":
                self.policy.layout = "padded"
            else:
                prove(self.policy, length=length)

    @torch.no_grad()
    def __call__(self, row: Row) -> torch.Tensor:
        """Log-probability of every scored token, float32 [S]."""
        return self.policy(row)  # type: ignore[no-any-return]


def opened(
    job: Job,
    stage: TrainingStage,
    name: str,
    tokenizer: Any,
    policy: Policy,
    precision: str,
    longest: Mapping[str, int],
) -> Other:
    """Another model as the reference.

    Args:
        name: a stage, base, a folder or a hub id.
        tokenizer: the policy's.
        longest: tokens of the longest path of each split.

    Raises:
        ModelError: its tokenizer is another one, its context is too short for training, or its positions end before a
            validation row does.
    """
    source = job.model(name)
    theirs = load.tokenizer(source, trust_remote_code=job.recipe.trust_remote_code)
    check_vocabulary(tokenizer, theirs, name)
    frozen_half = precision != "float32" and policy.device.type == "cuda"
    dtype = devices.DTYPES[precision] if frozen_half else torch.float32
    hf, notices = adapters.open_model(
        source, dtype=dtype, attention=stage.attention, device=policy.device,
        trust_remote_code=job.recipe.trust_remote_code,
    )  # fmt: skip
    for notice in notices:
        job.warn(notice)
    made = Other(hf, stage.layout, max(longest.values()), precision, policy.device)
    room, reach = load.context(made.policy.inner), load.reach(made.policy.inner)
    if room is not None and longest["train"] > room:
        raise ModelError(
            f"the reference {name} takes {room} tokens, and the longest pair has {longest['train']}",
            do=f"max_length: {room}, or another reference",
        )
    if reach is not None and longest["validation"] > reach:
        raise ModelError(
            f"the reference {name} takes {reach} tokens, and the longest validation pair, which is not cut, has "
            f"{longest['validation']}",
            do=f"drop: {{longer_than: {reach}}} in the data stage, or another reference",
        )
    return made


def check_vocabulary(ours: Any, theirs: Any, name: str) -> None:
    """ModelError where a reference would read other tokens out of the same ids."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine == other:
        return
    apart = sorted((mine.items() ^ other.items()), key=lambda item: item[1])
    some = ", ".join(f"{token!r}" for token in dict.fromkeys(token for token, _ in apart[:6]))
    raise ModelError(
        f"the reference {name} has another tokenizer than the model: {len(mine):,} and {len(other):,} tokens, "
        f"{len({token for token, _ in apart}):,} of them different",
        where=f"such as {some}",
        do="name a reference that was trained with the model's own tokenizer, or leave reference out",
    )


# Asked once


def key_of(identity: str, precision: str, layout: str, trees: Mapping[str, Sequence[Tree]]) -> str:
    """A SHA-256 over whose log-probabilities they are, how they were computed, and of which tokens."""
    digest = hashlib.sha256(f"{identity}|{precision}|{layout}".encode())
    for split, some in sorted(trees.items()):
        digest.update(f"{split}:{len(some)}".encode())
        for tree in some:
            for part in (tree.ids, tree.end, tree.tgt, tree.src):
                digest.update(np.ascontiguousarray(part).tobytes() + b"|")
    return digest.hexdigest()


def ask(
    score: Callable[[Row], torch.Tensor],
    policy: Policy,
    trees: Sequence[Tree],
    precision: str,
    sizes: tuple[int, int],
) -> np.ndarray:
    """Log-probabilities of all scored tokens of some trees, one after another, float32 [ΣS].

    Args:
        sizes: tokens of a row, and of a forward pass.
    """
    policy.eval()
    place = {id(t): k for k, t in enumerate(trees)}
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(trees)
    with torch.no_grad(), devices.autocast(policy.device, precision):
        for row in rows_of(trees, *sizes):
            found = score(row.to(policy.device)).float().cpu().numpy()
            ends = np.cumsum([len(t.tgt) for t in row.trees])
            for tree, part in zip(row.trees, np.split(found, ends[:-1]), strict=True):
                out[place[id(tree)]] = part
    return np.concatenate(out) if out else np.zeros(0, np.float32)


def with_column(trees: Sequence[Tree], found: np.ndarray) -> list[Tree]:
    """Trees with what `ask` gave for them as their column `reference`."""
    parts = np.split(found, np.cumsum([len(t.tgt) for t in trees])[:-1]) if trees else []
    return [dataclasses.replace(t, extra={**t.extra, "reference": part}) for t, part in zip(trees, parts, strict=True)]


def write_kept(file: Path, found: Mapping[str, np.ndarray], key: str) -> None:
    """Whole or not at all, with a key and a checksum."""
    tensors = {split: torch.from_numpy(values) for split, values in found.items()}
    write_atomic(file, save(tensors, {"key": key, "sha256": _checksum(found)}))


def read_kept(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """What was kept under this key; None where nothing is there or it is damaged.

    Raises:
        RunError: it is of another model, or of other rows.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as kept:
            about = kept.metadata() or {}
            found = {split: kept.get_tensor(split) for split in kept.keys()}  # noqa: SIM118  not a mapping
    except (OSError, ValueError, SafetensorError):
        return None
    if about.get("sha256") != _checksum(found):
        return None
    if about.get("key") != key:
        raise RunError(
            "the log-probabilities of the reference that were kept are of another model, or of other rows",
            where=str(file),
            do="delete the file: they are then computed anew",
        )
    return found


def _checksum(found: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for split, values in sorted(found.items()):
        digest.update(f"{split}:{values.dtype}:{len(values)}".encode() + values.tobytes())
    return digest.hexdigest()


# Before the first step


def check_start(loop: Loop, row: Row, *, dropout: bool) -> str:
    """What policy and reference make of the first batch before the first step, as a sentence.

    The policy is asked in the mode it is trained in: dropout that was left on shows here as it would in the loss.

    Args:
        row: with its column `reference`.
        dropout: it was asked for; then the comparison is made without it.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    policy = loop.policy
    policy.train(not dropout)
    row = row.to(policy.device)
    with torch.no_grad(), devices.autocast(policy.device, loop.precision):
        logps = policy(row)
        loss = loop.loss(logps, row.weight, **row.extra)
    value = float((loss.values * loss.weights).sum() / loss.weights.sum())
    apart = (logps - row.extra["reference"]).abs()
    mean, most = apart.mean().item(), apart.max().item()
    if not mean <= SAME[loop.precision]:
        raise TrainingError(
            f"the reference is not the policy before the first step: a token's log-probability differs by {mean:.2g} nats "
            f"on average, by up to {most:.2g}; the loss of the first batch is {value:.4f}",
            where=", ".join(t.origin for t in row.trees[:6]),
            do="was the adapter trained before (merge it first: merge: true in the stage that made it), is the checkpoint "
            "the one that was meant, is dropout on? A reference that is another model is named: reference: …",
        )
    return f"equal to the policy on the first batch (largest difference {most:.1e} nats a token); the loss there is {value:.4f}"


def distance(loop: Loop, row: Row) -> str:
    """How far a reference that is another model is from the policy before the first step, as a sentence."""
    loop.policy.eval()
    row = row.to(loop.policy.device)
    with torch.no_grad(), devices.autocast(loop.policy.device, loop.precision):
        apart = (loop.policy(row) - row.extra["reference"]).abs().mean().item()
    return f"another model than the policy: on the first batch a token's log-probability differs by {apart:.2g} nats on average"


def same_model(job: Job, one: str, other: str) -> bool:
    """Whether two names stand for the same weights."""
    return hub.identity(job.model(one)) == hub.identity(job.model(other))
