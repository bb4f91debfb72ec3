"""Losses of single tokens. Legend: S scored tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from temper.registry import Registry


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a loss gives: the step's loss is Σ values·weights / Σ weights over all its micro-batches."""

    values: torch.Tensor  # [S], with gradient
    weights: torch.Tensor  # [S], without
    extras: dict[str, torch.Tensor] = dataclasses.field(
        default_factory=dict
    )  # detached, [S] each; logged as weighted means


token_losses: Registry[Callable[..., Terms]] = Registry("token loss")


@token_losses.register("nll")
def nll(logps: torch.Tensor, weights: torch.Tensor) -> Terms:
    """Negative log-likelihood: value = −log p(token).

    Args:
        logps: log-probabilities of the scored tokens, nats [S].
        weights: weight of each [S]; 1 trains it, 0 does not.

    >>> terms = nll(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 1.0]))
    >>> float((terms.values * terms.weights).sum() / terms.weights.sum())
    2.0
    """
    return Terms(-logps, weights)
