"""Holding a policy to a reference: estimates of their KL from what was sampled. Legend: S scored tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from temper.losses.policy import of_completions
from temper.losses.token import Terms

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]


def divergence(logps: torch.Tensor, reference: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """An estimate of KL(policy ‖ reference) from each sampled token, nats [S] (Schulman 2020, "Approximating KL").

    With r = log p_ref − log p:  k1 = −r,  k2 = r²/2,  k3 = eʳ − r − 1.

    >>> p, q = torch.tensor([-1.0]), torch.tensor([-1.5])
    >>> [round(float(divergence(p, q, k)), 4) for k in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.1065]
    """
    r = reference - logps
    if estimator == "k1":
        return -r
    return r.square() / 2 if estimator == "k2" else r.exp() - r - 1


def with_divergence(
    loss: Callable[..., Terms],
    beta: float,
    estimator: Estimator,
    *,
    corrected: bool = True,
    level: Level = "token",
) -> Callable[..., Terms]:
    """A policy loss plus β times a KL estimate. A column `drawn` [S], where there is one, multiplies the estimate.

    Args:
        corrected: multiply k3 by the ratio p / p_old, through which the gradient flows too: the gradient of its mean is
            then that of the KL (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1). That of k2's mean is so by itself as
            long as the samples are the policy's own.
        level: token: the estimate from each token, of the KL of that token's distribution; what a token changes in the
            KL of later ones is left out of the gradient. sequence: k2 of the completion's whole log-ratio, a 1/|o| of it
            on each token; on policy its gradient is that of the completion's KL, and equals that of k1 in the reward.

    Raises:
        ValueError: k1, whose gradient is that of log p alone: zero in expectation over the policy's own samples; k3 of
            whole completions, which is e to the sum of their tokens' log-ratios.
    """
    if estimator == "k1":
        raise ValueError("k1 in the loss has no gradient in expectation")
    if estimator == "k3" and level == "sequence":
        raise ValueError("k3 of a whole completion grows with e to the sum of its log-ratios")

    def total(
        logps: torch.Tensor,
        weights: torch.Tensor,
        *,
        reference: torch.Tensor,
        drawn: torch.Tensor | None = None,
        **columns: torch.Tensor,
    ) -> Terms:
        terms = loss(logps, weights, **columns)
        if level == "sequence":
            log_ratio, length = of_completions(logps - reference, columns["completion"])
            kl = divergence(log_ratio, torch.zeros_like(log_ratio), estimator) / length
        else:
            kl = divergence(logps, reference, estimator)
            if corrected and estimator == "k3":
                kl = kl * (logps - columns.get("old", logps.detach())).exp()
        kl = kl if drawn is None else kl * drawn
        return Terms(terms.values + beta * kl, terms.weights, {**terms.extras, "kl": kl.detach()})

    return total
