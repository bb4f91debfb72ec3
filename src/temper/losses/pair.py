"""Losses of pairs: a text that is preferred and one that is not. Legend: P pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from temper.losses.token import Terms
from temper.registry import Registry

pair_losses: Registry[Callable[..., Terms]] = Registry("pair loss")


@pair_losses.register("bradley_terry")
def bradley_terry(
    scores: torch.Tensor, weights: torch.Tensor, margin: torch.Tensor | None = None, *, centre: float = 0.0
) -> Terms:
    """Preferred with the probability σ(r_c − r_r): value = −log σ(r_c − r_r − m) + centre·(r_c + r_r)².

    Bradley and Terry 1952; as a loss of reward models Ouyang et al. 2022 ("InstructGPT"), equation 1. The margin is
    Llama 2's (Touvron et al. 2023, equation 2), the second term Eisenstein et al. 2023 ("Helping or herding?", equation 2).

    Args:
        scores: rewards [2P]: chosen, rejected, chosen, rejected, …
        weights: weight of each pair [P].
        margin: by how much the chosen text is to be ahead [P]; None: 0.
        centre: weight of the term that holds the rewards of a pair around zero, which differences alone leave open.

    >>> terms = bradley_terry(torch.tensor([2.0, 1.0]), torch.ones(1), centre=0.01)
    >>> round(float(terms.values), 4), float(terms.extras["accuracy"])  # ln(1 + 1/e) + 0.01·3²
    (0.4033, 1.0)
    """
    chosen, rejected = scores.view(-1, 2).unbind(1)
    difference = chosen - rejected
    values = -functional.logsigmoid(difference if margin is None else difference - margin)
    if centre:
        values = values + centre * (chosen + rejected).square()
    with torch.no_grad():
        extras = {
            "accuracy": (difference.sign() + 1) / 2,  # a tie counts half
            "margin": difference.detach().clone(),
            "reward": (chosen + rejected) / 2,
        }
    return Terms(values, weights, extras)
