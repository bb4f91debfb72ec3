"""Losses: pure functions of tensors. Nothing here reads a file or a recipe, and none of them reduces.

A loss returns `Terms`: unreduced values, their weights, and detached extras to log. The loop divides once, by the sum
of the weights over the whole optimiser step and all ranks, so a result does not depend on how a batch was cut.
"""

from temper.losses.divergence import divergence, with_divergence
from temper.losses.pair import bradley_terry, pair_losses
from temper.losses.policy import grpo, policy_losses, summed
from temper.losses.token import Terms, nll, token_losses

__all__ = [
    "Terms",
    "bradley_terry",
    "divergence",
    "grpo",
    "nll",
    "pair_losses",
    "policy_losses",
    "summed",
    "token_losses",
    "with_divergence",
]
