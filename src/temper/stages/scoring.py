"""Likelihoods of references, and divergences along answers, by the tree pass; what an evaluation keeps of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from temper.data.chat import Encoded
from temper.engine import device as devices
from temper.errors import DataError, ModelError
from temper.models.scores import Policy, prove
from temper.rollouts.decoding import Completion
from temper.stages.sft import tree_of
from temper.trees import Row, Tree, group, rows_of
from temper.types import Outputs, Record

ROW_TOKENS = 256


def likelihood(
    policy: Policy, encoded: list[Encoded], precision: str, context: int, name: str, micro_tokens: int
) -> tuple[list[float], list[int]]:
    """Summed negative log-likelihood of each answer in nats, and its number of tokens.

    Raises:
        DataError: a row longer than the model's context.
    """
    for e in encoded:
        if len(e.ids) > context:
            raise DataError(
                f"a row of {len(e.ids)} tokens exceeds the context of {name} ({context})",
                where=e.where,
                do="drop: {longer_than: …} in the data stage",
            )
    trees = [tree_of(e) for e in encoded]
    return _sums(policy, trees, lambda row: -policy(row), precision, micro_tokens), [len(t.tgt) for t in trees]


def divergence(
    policy: Policy,
    opened: tuple[Policy, Any] | None,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Completion],
    precision: str,
    micro_tokens: int,
) -> list[float]:
    """KL(policy ‖ other) along each answer, in nats summed over its tokens, the end token's place among them.

    Args:
        opened: the other model and its tokenizer; None: the policy itself, whose divergence is 0.

    Raises:
        ModelError: the two have different tokenizers.
    """
    if opened is None:
        return [0.0] * len(answers)
    other, others = opened
    if others.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            "kl compares distributions over tokens, and the two models' tokenizers differ", do="leave kl out"
        )
    prove(other)  # of another architecture it may be, or of another layout
    trees = [
        group(p, [a.ids if a.end is None else [*a.ids, a.end]]) for p, a in zip(prompts, answers, strict=True)
    ]  # fmt: skip
    other.eval()
    return _sums(policy, trees, lambda row: policy.divergence(other, row), precision, micro_tokens)


def _sums(
    policy: Policy, trees: list[Tree], score: Callable[[Row], torch.Tensor], precision: str, micro_tokens: int
) -> list[float]:
    """A score of tokens, summed over each tree of one branch."""
    place = {id(t): k for k, t in enumerate(trees)}
    out = [0.0] * len(trees)
    policy.eval()
    with torch.no_grad(), devices.autocast(policy.device, precision):
        for row in rows_of(trees, ROW_TOKENS, micro_tokens):
            sums = torch.zeros(len(row.trees), dtype=torch.float64)
            sums.index_add_(0, row.branch, score(row.to(policy.device)).double().cpu())
            for tree, value in zip(row.trees, sums.tolist(), strict=True):
                out[place[id(tree)]] = value
    return out


def outputs_of(raw: dict[str, Any]) -> Outputs:
    """What `columns` made, filled in."""
    return Outputs(
        raw["prompts"], raw["predictions"], raw["references"], raw["ended"],
        None if raw["nll"] is None else np.array(raw["nll"], np.float64),
        None if raw["tokens"] is None else np.array(raw["tokens"], np.int64),
        None if raw["toxicity"] is None else np.array(raw["toxicity"], np.float64),
        None if raw["kl"] is None else np.array(raw["kl"], np.float64),
        raw["kl_to"],
        raw["classifier"],
        *(None if raw[key] is None else np.array(raw[key], np.float64) for key in ("rewards", "second_rewards")),
        tuple(raw["reward_models"]),
    )  # fmt: skip


def columns(prompts: list[str], references: list[str], **more: Any) -> dict[str, Any]:
    """Columns of `Outputs` as JSON holds them, before anything was asked; «texts», all samples row by row; «wholes», each
    prompt and its first answer as one text."""
    n = len(prompts)
    none = {
        "nll": None,
        "tokens": None,
        "toxicity": None,
        "classifier": "",
        "kl": None,
        "kl_to": "",
        "rewards": None,
        "second_rewards": None,
        "reward_models": [],
        "texts": [],
        "wholes": [],
    }
    return {"prompts": prompts, "references": references, "predictions": [""] * n, "ended": [True] * n, **none, **more}


def content(records: list[Record]) -> str:
    """SHA-256 of rows."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(sorted(record.row.items())).encode())
    return digest.hexdigest()
