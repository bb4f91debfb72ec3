"""Losses of a policy on its own samples. Legend: S scored tokens of completions.

All take columns of the row by name: `advantage` of the token's completion, `old`, the log-probability under the policy
that sampled (None: this very policy, so the ratio is 1 and its gradient that of log p), and where a KL term is in the
loss `reference`, the log-probability under the reference model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from temper.losses.token import Terms
from temper.registry import Registry

policy_losses: Registry[Callable[..., Terms]] = Registry("algorithm")

Estimator = Literal["k1", "k2", "k3"]


@policy_losses.register("grpo")
def grpo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Terms:
    """Group-relative policy optimisation: value = −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), with ρ = p / p_old.

    Shao et al. 2024 ("DeepSeekMath"), equation 3; the clipping is PPO's (Schulman et al. 2017, equation 7).

    Args:
        logps: log-probabilities of the scored tokens, nats [S].
        weights: weight of each [S].
        advantage: advantage of each token's completion [S].
        old: log-probabilities under the policy that sampled [S].
        epsilon: how far the ratio may fall below 1, and rise above it where `epsilon_high` is null.
        epsilon_high: how far it may rise above 1 (Yu et al. 2025, "DAPO", equation 10).
        delta: upper bound of the ratio where the advantage is negative (two-sided clipping, INTELLECT-2, 2025).

    >>> ratio, advantage = torch.tensor([1.5, 0.5, 0.5]), torch.tensor([2.0, 2.0, -2.0])
    >>> grpo(ratio.log(), torch.ones(3), advantage, torch.zeros(3)).values.tolist()
    [-2.4000000953674316, -1.0, 1.600000023841858]
    """
    ratio = (logps - (logps.detach() if old is None else old)).exp()
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    clipped = ratio.clamp(low, high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    values = -torch.minimum(bounded * advantage, clipped * advantage)
    outside = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    return Terms(values, weights, {"ratio": ratio.detach(), "clipped": outside.float()})


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
    loss: Callable[..., Terms], beta: float, estimator: Estimator, *, corrected: bool = True
) -> Callable[..., Terms]:
    """A policy loss plus β times the KL estimate of each token.

    Args:
        corrected: multiply k3 by the ratio p / p_old, through which the gradient flows too: the gradient of its mean is
            then that of the KL (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1). That of k2's mean is so by itself as
            long as the samples are the policy's own.

    Raises:
        ValueError: k1, whose gradient is that of log p alone: zero in expectation over the policy's own samples.
    """
    if estimator == "k1":
        raise ValueError("k1 in the loss has no gradient in expectation")

    def total(logps: torch.Tensor, weights: torch.Tensor, *, reference: torch.Tensor, **columns: torch.Tensor) -> Terms:
        terms = loss(logps, weights, **columns)
        kl = divergence(logps, reference, estimator)
        if corrected and estimator == "k3":
            kl = kl * (logps - columns.get("old", logps.detach())).exp()
        return Terms(terms.values + beta * kl, terms.weights, {**terms.extras, "kl": kl.detach()})

    return total
