"""One rollout: how it is made, what was written, what it was worth; to disk and back, bit for bit.

Legend: P prompts, k completions of each, N = P·k; S scored tokens (a completion with its end token).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch

from temper.advantages import Baseline
from temper.recipe import Config, detail
from temper.rollouts.decoding import Completion, Decoding
from temper.types import Record


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row as the policy is asked it."""

    record: Record
    ids: list[int]
    text: str
    reference: str  # its answer, "" where it has none


class Collapse(Config):
    """When training warns that rewards rise at the cost of variety."""

    rollouts: int = detail(20, "Rollouts that are looked at, the later half against the earlier; 0: never.", ge=0)
    distinct_2: float = detail(0.6, "Warn where distinct_2 falls, and below this.", ge=0, le=1)
    variety: float = detail(0.3, "Warn where 1 − self_bleu falls, and below this.", ge=0, le=1)


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
    advantages: Callable[[np.ndarray, float], Baseline]  # rewards [P, k], mean of earlier rollouts
    compares: str  # group: completions of one prompt; batch, past or nothing: of the whole rollout
    token_weights: bool  # every token counts alike, not every completion
    mask_cut: bool  # completions cut by the limit are not trained on
    reward_beta: float  # of the KL term in the reward, 0: none there
    kl_level: str  # there: sequence, a completion bears all of its KL; token, a token what is its own and comes after
    kl_one: bool  # the KL is measured on one completion of each prompt, drawn at random, for all
    seed: int
    samples: int  # completions shown of a rollout
    collapse: Collapse


@dataclasses.dataclass
class Rollout:
    """One rollout, flat: arrays of N completions, or of all their scored tokens one after another."""

    batches: list[list[int]]  # which prompts each of its optimiser steps takes; P in all
    done: list[Completion]  # [N]
    texts: list[str]  # [N]
    total: np.ndarray  # [N] reward, nan: none
    each: dict[str, np.ndarray]  # [N] by name, unweighted
    advantage: np.ndarray  # [N]
    # [S] by name: sampled, and where they are needed old, reference, drawn (weight of the token's KL) and relief (what a
    # token's advantage exceeds its completion's by)
    columns: dict[str, np.ndarray]
    past: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))  # sum and number of all rewards so far
    # of samples of a server: how far it is from the policy in nats a token, and the share of the adapter's doing that it lacks
    engine: np.ndarray | None = None

    @property
    def prompts(self) -> list[int]:
        """Which prompts, one after another [P]."""
        return [i for batch in self.batches for i in batch]


def text_of(completion: Completion, tokenizer: Any) -> str:
    """A completion as text, without special tokens and outer white space."""
    if completion.text is not None:
        return completion.text.strip()
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True)).strip()


def cuts(done: Sequence[Completion]) -> np.ndarray:
    """Where the completions' scored tokens begin in a flat array, the first apart (for numpy.split)."""
    return np.cumsum([len(c.scored) for c in done])[:-1]


def mean(values: np.ndarray) -> float | None:
    """Mean of what there is; None where there is nothing."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def packed(r: Rollout) -> bytes:
    """A SHA-256, then the arrays as safetensors."""
    tokens = [c.scored for c in r.done]
    arrays = {
        "length": np.array([len(t) for t in tokens], np.int64),
        "ids": np.array([i for t in tokens for i in t], np.int64),
        "raw": np.concatenate([c.raw for c in r.done]).astype(np.float32),
        "end": np.array([-1 if c.end is None else c.end for c in r.done], np.int64),
        "ended": np.array([c.ended for c in r.done], np.int64),
        "texts": np.frombuffer("\0".join(t.replace("\0", "") for t in r.texts).encode() or b"\0", np.uint8).copy(),
        "total": r.total,
        "advantage": r.advantage,
        "past": r.past,
        **({} if r.engine is None else {"engine": r.engine}),
        **{f"each.{name}": values for name, values in r.each.items()},
        **{f"columns.{name}": values for name, values in r.columns.items()},
    }
    raw = safetensors.torch.save({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in arrays.items()})
    return hashlib.sha256(raw).digest() + raw


def unpacked(raw: bytes, batches: list[list[int]]) -> Rollout | None:
    """What `packed` wrote; None if its checksum does not hold."""
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        return None
    a = {name: t.numpy() for name, t in safetensors.torch.load(raw[32:]).items()}
    parts = [np.split(a[name], np.cumsum(a["length"])[:-1]) for name in ("ids", "columns.sampled", "raw")]
    done = []
    for ids, logps, plain, end, ended in zip(*parts, a["end"].tolist(), a["ended"].tolist(), strict=True):
        kept = ids.tolist() if end < 0 else ids[:-1].tolist()
        done.append(Completion(kept, bool(ended), None if end < 0 else end, logps, plain))
    texts = bytes(a["texts"]).decode().split("\0")
    each = {n.removeprefix("each."): v for n, v in a.items() if n.startswith("each.")}
    columns = {n.removeprefix("columns."): v for n, v in a.items() if n.startswith("columns.")}
    return Rollout(batches, done, texts, a["total"], each, a["advantage"], columns, a["past"], a.get("engine"))


def until(values: np.ndarray, done: Sequence[Completion]) -> np.ndarray:
    """The sum of a completion's values before each of its tokens [S]."""
    return np.concatenate([np.cumsum(part) - part for part in np.split(values, cuts(done))])
