"""Likelihoods of references, preferences, and divergences along answers, by the tree pass; what an evaluation keeps of a
model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from temper.data.chat import Encoded
from temper.data.formats import answered, split
from temper.engine import device as devices
from temper.errors import DataError, ModelError
from temper.models.proof import prove
from temper.models.scores import Policy
from temper.rollouts.decoding import Completion
from temper.stages.couples import Couple
from temper.stages.sft import tree_of
from temper.trees import Row, Tree, group, rows_of
from temper.types import Outputs, Record

ROW_TOKENS = 256
# Columns of `Outputs` that are numbers.
ARRAYS = ("nll", "tokens", "toxicity", "kl", "rewards", "second_rewards", "pairs", "pair_tokens")


def likelihood(
    policy: Policy, encoded: Sequence[Encoded], precision: str, reach: int, micro_tokens: int
) -> dict[str, list[Any]]:
    """Columns of `Outputs`: summed negative log-likelihoods of answers in nats, and their numbers of tokens.

    Args:
        reach: the longest sequence that the model can score; a longer row has 0 nats and 0 tokens.
    """
    fits = [k for k, e in enumerate(encoded) if e.length <= reach]
    trees = [tree_of(encoded[k]) for k in fits]
    nll, tokens = [0.0] * len(encoded), [0] * len(encoded)
    for k, tree, (value,) in zip(fits, trees, _sums(policy, trees, policy, precision, micro_tokens), strict=True):
        nll[k], tokens[k] = -value, len(tree.tgt)
    return {"nll": nll, "tokens": tokens}


def preferences(
    policy: Policy, couples: Sequence[Couple], precision: str, reach: int, micro_tokens: int
) -> dict[str, list[Any]]:
    """Columns of `Outputs`: log-probabilities of chosen and rejected answers, and their numbers of tokens; and those that
    `likelihood` gives, of the chosen ones.

    Args:
        reach: as in `likelihood`; where either answer's path is longer, the pair has none.
    """
    fits = [k for k, couple in enumerate(couples) if couple.length <= reach]
    trees = [couples[k].tree(k) for k in fits]
    pairs: list[Any] = [[None, None] for _ in couples]
    tokens = [[0, 0] for _ in couples]
    nll = [0.0] * len(couples)
    for k, tree, sums in zip(fits, trees, _sums(policy, trees, policy, precision, micro_tokens), strict=True):
        pairs[k], tokens[k], nll[k] = sums, np.bincount(tree.branch, minlength=2).tolist(), -sums[0]
    return {"pairs": pairs, "pair_tokens": tokens, "nll": nll, "tokens": [chosen for chosen, _ in tokens]}


def check_preferences(records: Sequence[Record]) -> None:
    """Raises DataError where rows have no two answers to prefer one of."""
    if lacking := next((r for r in records if not {"chosen", "rejected"} <= r.row.keys()), None):
        raise DataError(
            f"preference_accuracy and margin compare chosen and rejected; this row has {', '.join(lacking.row)}",
            where=lacking.where,
            do="name a data stage of preferences, or leave these metrics out",
        )


def preferred(record: Record) -> Record:
    """A row of a preference with its chosen answer as the completion; any other row as it is."""
    if not {"chosen", "rejected"} <= record.row.keys():
        return record
    found = split(record.row)
    if found is None:
        raise DataError(
            "the prompt differs between chosen and rejected",
            where=record.where,
            do="see that both answer the same prompt",
        )
    rest = {k: v for k, v in record.row.items() if k not in ("prompt", "chosen", "rejected")}
    return Record({**rest, **answered(*found[:2])}, record.where)


def set_apart(outputs: dict[str, Outputs], reaches: dict[str, int | None]) -> tuple[dict[str, Outputs], int]:
    """Rows that some model cannot score are scored for none: models are compared on the same rows.

    Args:
        reaches: model → the longest sequence it can score.

    Returns:
        The outputs without such scores, and how many rows these are.
    """
    scored = [out.tokens > 0 for out in outputs.values() if out.tokens is not None]
    apart = ~np.logical_and.reduce(scored) if scored and any(reaches.values()) else np.zeros(0, bool)
    if not apart.any():
        return outputs, 0
    if apart.all():
        raise DataError(
            "every row is longer than some model can score",
            do="leave the model with the shortest context out, or drop: {longer_than: …} in the data stage",
        )
    return {name: _without(out, apart) for name, out in outputs.items()}, int(apart.sum())


def _without(out: Outputs, apart: np.ndarray) -> Outputs:
    """Likelihoods and preferences of some rows taken out; nothing else of them is."""
    empty: dict[str, Any] = {"nll": 0.0, "tokens": 0, "pairs": math.nan, "pair_tokens": 0, "reference_pairs": math.nan}
    columns = {name: getattr(out, name) for name in empty}
    for name, column in columns.items():
        if column is not None:
            columns[name] = column.copy()
            columns[name][apart] = empty[name]
    return dataclasses.replace(out, **columns)


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
    return [
        value for (value,) in _sums(policy, trees, lambda row: policy.divergence(other, row), precision, micro_tokens)
    ]


def _sums(
    policy: Policy, trees: list[Tree], score: Callable[[Row], torch.Tensor], precision: str, micro_tokens: int
) -> list[list[float]]:
    """A score of tokens, summed over each branch of each tree."""
    place = {id(t): k for k, t in enumerate(trees)}
    out: list[list[float]] = [[]] * len(trees)
    policy.eval()
    with torch.no_grad(), devices.autocast(policy.device, precision):
        for row in rows_of(trees, policy.lane(ROW_TOKENS), micro_tokens) if trees else []:
            sums = torch.zeros(sum(len(t.tips) for t in row.trees), dtype=torch.float64)
            sums.index_add_(0, row.branch, score(row.to(policy.device)).double().cpu())
            for tree, values in zip(row.trees, sums.split([len(t.tips) for t in row.trees]), strict=True):
                out[place[id(tree)]] = values.tolist()
    return out


def outputs_of(raw: dict[str, Any]) -> Outputs:
    """What `columns` made, filled in."""
    kinds = {"tokens": np.int64, "pair_tokens": np.int64}
    arrays: dict[str, Any] = {
        name: None if raw[name] is None else np.array(raw[name], kinds.get(name, np.float64)) for name in ARRAYS
    }  # fmt: skip
    plain: dict[str, Any] = {
        name: raw[name] for name in ("prompts", "predictions", "references", "ended", "kl_to", "classifier")
    }
    return Outputs(**plain, **arrays, reward_models=tuple(raw["reward_models"]))


def columns(prompts: list[str], references: list[str], **more: Any) -> dict[str, Any]:
    """Columns of `Outputs` as JSON holds them, before anything was asked; «texts», all samples row by row; «wholes», each
    prompt and its first answer as one text."""
    n = len(prompts)
    none = dict.fromkeys(ARRAYS) | {"classifier": "", "kl_to": "", "reward_models": [], "texts": [], "wholes": []}
    return {"prompts": prompts, "references": references, "predictions": [""] * n, "ended": [True] * n, **none, **more}


def content(records: list[Record]) -> str:
    """SHA-256 of rows."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(sorted(record.row.items())).encode())
    return digest.hexdigest()
