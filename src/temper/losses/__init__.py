"""Losses: pure functions of tensors. Nothing here reads a file or a recipe, and none of them reduces.

A loss returns `Terms`: unreduced values, their weights, and detached extras to log. The loop divides once, by the sum
of the weights over the whole optimiser step and all ranks, so a result does not depend on how a batch was cut. Losses of
preferences return the values alone, one a pair or an answer; `docs/losses.md` says what each is for.
"""

from temper.losses.divergence import divergence, with_divergence
from temper.losses.mixtures import COUPLED, REFERENCE_FREE, Mixture, mixture, unpaired
from temper.losses.pair import bradley_terry, pair_losses
from temper.losses.policy import grpo, policy_losses, summed
from temper.losses.preference import Compared, preference_losses
from temper.losses.token import Terms, nll, token_losses
from temper.losses.unpaired import kto_loss, unpaired_losses

__all__ = [
    "COUPLED",
    "REFERENCE_FREE",
    "Compared",
    "Mixture",
    "Terms",
    "bradley_terry",
    "divergence",
    "grpo",
    "kto_loss",
    "mixture",
    "nll",
    "pair_losses",
    "policy_losses",
    "preference_losses",
    "summed",
    "token_losses",
    "unpaired",
    "unpaired_losses",
    "with_divergence",
]
