"""Losses of pairs that need no reference model: they ask only what the policy itself makes of both answers.

Legend and notation as in `preference.py`; log π(y_c) and log π(y_r) are whole answers' log-probabilities.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch.nn.functional import logsigmoid

from temper.losses.preference import ONE, Compared, Flipped, Positive, preference_losses, smoothed  # noqa: F401  ONE: the pair of the docstrings

NotNegative = Annotated[float, Ge(0)]


@preference_losses.register("sft")
def sft(pairs: Compared) -> torch.Tensor:
    """Likelihood of the chosen answer: value = −log π(y_c) / |y_c|. A term beside others that keeps it from falling.

    Pang et al. 2024 ("Iterative reasoning preference optimization"), section 2. Every pair counts alike; TRL's `sft`
    averages over all tokens of a micro-batch, in which long answers count more, and which depends on how it was cut.

    >>> float(sft(ONE))
    0.5
    """
    return -pairs.chosen / pairs.chosen_length


@preference_losses.register("simpo")
def simpo(
    pairs: Compared, *, beta: Positive = 2.0, gamma: NotNegative = 1.0, label_smoothing: Flipped = 0.0
) -> torch.Tensor:
    """The mean log-probability of a token is the reward: value = −log σ(β·log π(y_c)/|y_c| − β·log π(y_r)/|y_r| − γ).

    Meng et al. 2024 ("SimPO"), equation 6. TRL adds the likelihood of the chosen answer unless told not to; here it is a
    part of a mixture: [simpo, sft].

    Args:
        beta: scale of the rewards.
        gamma: by how much the chosen answer is to be ahead; the paper's γ, not its ratio γ/β.
        label_smoothing: share of pairs that are taken to be the wrong way round.

    >>> round(float(simpo(ONE)), 4)  # 2·(−1/2 + 3/4) − 1 = −1/2: ln(1 + e^½)
    0.9741
    """
    ahead = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    return smoothed(beta * ahead - gamma, label_smoothing)


@preference_losses.register("orpo")
def orpo(pairs: Compared, *, beta: Positive = 0.1) -> torch.Tensor:
    """SFT and an odds ratio in one: value = −log π(y_c)/|y_c| − β·log σ(log odds(y_c) − log odds(y_r)).

    Hong et al. 2024 ("ORPO"), equations 4, 6 and 7, where β is λ; odds = p/(1 − p), p the geometric mean of the answer's
    token probabilities. The first term is over the answer; TRL, as the authors' code, takes the prompt in as well.

    Args:
        beta: weight of the odds ratio beside the likelihood.

    >>> round(float(orpo(ONE, beta=1.0)), 4)  # 0.5 + ln(1 + e^−(0.43275 + 0.11065))
    0.9579
    """
    won, lost = pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length
    return sft(pairs) - beta * logsigmoid(_log_odds(won) - _log_odds(lost))


@preference_losses.register("cpo")
def cpo(
    pairs: Compared, *, beta: Positive = 0.1, alpha: NotNegative = 1.0, label_smoothing: Flipped = 0.0
) -> torch.Tensor:
    """DPO with a uniform reference, and SFT: value = −log σ(β(log π(y_c) − log π(y_r))) − α·log π(y_c)/|y_c|.

    Xu et al. 2024 ("Contrastive preference optimization"), section 3. The paper writes the likelihood of the whole answer;
    the mean over its tokens is that of the authors' code and of TRL, whose mean is over the tokens of a micro-batch.

    Args:
        beta: scale of the difference.
        alpha: weight of the likelihood of the chosen answer.
        label_smoothing: share of pairs that are taken to be the wrong way round.

    >>> round(float(cpo(ONE, beta=1.0)), 4)  # ln(1 + e⁻²) + 1/2
    0.6269
    """
    return smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing) + alpha * sft(pairs)


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log p − log(1 − p) of p = e^mean. At p = 1 exactly, which float32 reaches, it is large instead of infinite."""
    return mean - (-torch.expm1(mean.clamp(max=-1e-7))).log()
