"""Losses of single answers, of which each is known to be wanted or not. Legend: N answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge

from temper.losses.preference import Positive
from temper.registry import Registry

unpaired_losses: Registry[Callable[..., torch.Tensor]] = Registry("unpaired loss")


@unpaired_losses.register("kto")
def kto_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    z0: torch.Tensor,
    *,
    beta: Positive = 0.1,
    desirable_weight: Annotated[float, Ge(0)] = 1.0,
    undesirable_weight: Annotated[float, Ge(0)] = 1.0,
) -> torch.Tensor:
    """KTO: value = λ_D·(1 − σ(β(r − z₀))) of a desirable answer, λ_U·(1 − σ(β(z₀ − r))) of another, r its log-ratio.

    Ethayarajh et al. 2024 ("KTO: model alignment as prospect theoretic optimization"), equation 7. z₀ estimates the KL of
    policy and reference: the mean log-ratio, over the step, of answers set beside the prompts of others, not below 0.

    Args:
        policy: log-probabilities of whole answers, nats [N].
        reference: the same under the reference [N].
        desirable: which are wanted, bool [N].
        z0: the KL estimate, nats, a scalar; no gradient goes through it.
        beta: how strongly the policy is held to the reference.
        desirable_weight: weight λ_D of wanted answers; the paper has λ_D·n_D / λ_U·n_U between 1 and 4/3.
        undesirable_weight: weight λ_U of the others.

    Returns:
        Values [N].

    Raises:
        ValueError: shapes differ, or z0 is not one number.

    >>> policy, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
    >>> values = kto_loss(policy, reference, torch.tensor([True, False]), torch.tensor(0.5), beta=1.0)
    >>> [round(v, 4) for v in values.tolist()]  # 1 − σ(1 − 0.5), 1 − σ(0.5 + 1)
    [0.3775, 0.1824]
    """
    if not policy.shape == reference.shape == desirable.shape or z0.dim():
        raise ValueError(f"one number an answer, and one z0: {policy.shape}, {reference.shape}, {desirable.shape}, {z0.shape}")  # fmt: skip
    above = beta * (policy - reference - z0.detach())
    return torch.where(desirable, desirable_weight * torch.sigmoid(-above), undesirable_weight * torch.sigmoid(above))
