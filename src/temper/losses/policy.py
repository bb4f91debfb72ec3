"""Losses of a policy on its own samples. Legend: S scored tokens of completions.

All take columns of the row by name: `advantage` of the token's completion; `completion`, the number of that completion,
by which those that weigh whole completions know its tokens; `old`, the log-probability under the policy that sampled
(None: this very policy, so the ratio is 1 and its gradient that of log p); and where a KL term is in the loss
`reference`, the log-probability under the reference model.

What is here gives a value to each token. How tokens are averaged is decided by their weights: 1, or 1/|o| for a
completion o of |o| tokens; `summed` makes of the latter the sum over a completion. At the sampling policy every loss has
the gradient −advantage·weight, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from temper.losses.token import Terms
from temper.registry import Registry

policy_losses: Registry[Callable[..., Terms]] = Registry("algorithm")


@policy_losses.register("grpo")
def grpo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
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


@policy_losses.register("dr_grpo")
def dr_grpo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Terms:
    """GRPO done right: GRPO's loss, advantages not divided, sums over tokens divided by a constant.

    Liu et al. 2025 ("Understanding R1-Zero-like training"), section 3.2. The value of a token is GRPO's; what differs are
    the defaults of `advantage` (scale none), `average` (constant) and `kl` (none).

    Args:
        epsilon: how far the ratio may fall below 1, and rise above it where `epsilon_high` is null.
        epsilon_high: how far it may rise above 1.

    >>> dr_grpo(torch.tensor([1.5]).log(), torch.ones(1), torch.tensor([2.0]), torch.zeros(1)).values.tolist()
    [-2.4000000953674316]
    """
    return grpo(logps, weights, advantage, old, epsilon=epsilon, epsilon_high=epsilon_high)


@policy_losses.register("dapo")
def dapo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
) -> Terms:
    """GRPO's loss with a higher upper clip, every token counting alike, cut completions left out, no KL.

    Yu et al. 2025 ("DAPO"), equation 8 and section 3.2. Left out: their resampling of groups whose rewards are all equal,
    and their soft punishment of length, which would be a reward.

    Args:
        epsilon: how far the ratio may fall below 1.
        epsilon_high: how far it may rise above 1.

    >>> dapo(torch.tensor([1.5]).log(), torch.ones(1), torch.tensor([2.0]), torch.zeros(1)).values.tolist()
    [-2.559999942779541]
    """
    return grpo(logps, weights, advantage, old, epsilon=epsilon, epsilon_high=epsilon_high)


@policy_losses.register("reinforce++")
def reinforce_pp(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Terms:
    """PPO's clipped loss without a critic; advantages normalised over the whole batch, KL from each token on in the reward.

    Hu et al. 2025 ("REINFORCE++"), equations 8 to 10. The value of a token is GRPO's.

    Args:
        epsilon: how far the ratio may fall below 1, and rise above it where `epsilon_high` is null.
        epsilon_high: how far it may rise above 1.

    >>> reinforce_pp(torch.tensor([0.5]).log(), torch.ones(1), torch.tensor([-2.0]), torch.zeros(1)).values.tolist()
    [1.600000023841858]
    """
    return grpo(logps, weights, advantage, old, epsilon=epsilon, epsilon_high=epsilon_high)


@policy_losses.register("cispo")
def cispo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
    *,
    ceiling: float = 5.0,
) -> Terms:
    """Clipped importance weights, through which no gradient flows: value = −sg(min(ρ, ceiling))·A·log p.

    MiniMax 2025 ("MiniMax-M1"), equation 4; no token's gradient is lost to the clipping.

    Args:
        ceiling: largest weight; TRL calls it epsilon_high.

    >>> cispo(torch.tensor([-1.0]), torch.ones(1), torch.tensor([2.0]), torch.tensor([-4.0])).values.tolist()
    [10.0]
    """
    ratio = (logps - (logps if old is None else old)).detach().exp()
    over = (ratio > ceiling).float()
    return Terms(-ratio.clamp(max=ceiling) * advantage * logps, weights, {"ratio": ratio, "clipped": over})


@policy_losses.register("reinforce")
def reinforce(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    old: torch.Tensor | None = None,
    completion: torch.Tensor | None = None,
) -> Terms:
    """The likelihood of what was sampled, times its advantage: value = −A·log p.

    Williams 1992 ("Simple statistical gradient-following algorithms"), equation 4, with a completion as one action
    (the sum over its tokens). It has no ratio, so each update needs samples of its own.

    >>> reinforce(torch.tensor([-1.0, -3.0]), torch.ones(2), torch.tensor([2.0, -1.0])).values.tolist()
    [2.0, -3.0]
    """
    return Terms(-advantage * logps, weights)


@policy_losses.register("rloo")
def rloo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    completion: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Terms:
    """REINFORCE with the mean of the prompt's other completions as baseline: −min(ρ·A, clip(ρ)·A), ρ of the completion.

    Ahmadian et al. 2024 ("Back to Basics"), equation 8; Kool et al. 2019. The completion is one action, so its ratio is
    ρ = exp(Σ log p − log p_old) over its tokens, clipped as PPO's (as TRL does; on policy ρ = 1 and the clip does
    nothing). Each token carries 1/|o| of the completion's value.

    Args:
        completion: number of each token's completion [S].
        epsilon: how far the ratio may fall below 1, and rise above it where `epsilon_high` is null.
        epsilon_high: how far it may rise above 1.

    >>> logps, of = torch.tensor([0.5, 0.25, 0.8]).log(), torch.tensor([0, 0, 1])
    >>> rloo(logps, torch.ones(3), torch.tensor([-2.0, -2.0, 1.0]), of, torch.tensor([0.25, 0.25, 0.8]).log()).values.tolist()
    [2.0, 2.0, -1.0]
    """
    log_ratio, length = of_completions(logps - (logps.detach() if old is None else old), completion)
    terms = grpo(log_ratio, weights, advantage, torch.zeros_like(log_ratio), epsilon=epsilon, epsilon_high=epsilon_high)
    return Terms(terms.values / length, weights, terms.extras)


@policy_losses.register("gspo")
def gspo(
    logps: torch.Tensor,
    weights: torch.Tensor,
    advantage: torch.Tensor,
    completion: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Terms:
    """GRPO with one ratio a completion: value = −min(s·A, clip(s)·A), s = (p(o) / p_old(o))^(1/|o|).

    Zheng et al. 2025 ("Group sequence policy optimization"), equations 5 to 7 and section 5.1 for the clipping.

    Args:
        completion: number of each token's completion [S].
        epsilon: how far the ratio may fall below 1.
        epsilon_high: how far it may rise above 1.

    >>> logps, of = torch.tensor([0.5, 0.5, 0.8]).log(), torch.tensor([0, 0, 1])
    >>> gspo(logps, torch.ones(3), torch.tensor([-1.0, -1.0, 1.0]), of, torch.tensor([0.25, 0.25, 0.8]).log()).values.tolist()
    [2.0, 2.0, -1.0]
    """
    total, length = of_completions(logps - (logps.detach() if old is None else old), completion)
    log_ratio = total / length
    return grpo(log_ratio, weights, advantage, torch.zeros_like(log_ratio), epsilon=epsilon, epsilon_high=epsilon_high)


def of_completions(values: torch.Tensor, completion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's completion: the sum of its tokens' values and their number, both [S].

    >>> [t.tolist() for t in of_completions(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([7, 7, 9]))]
    [[3.0, 3.0, 4.0], [2.0, 2.0, 1.0]]
    """
    found, place = completion.unique(return_inverse=True)
    sums = values.new_zeros(len(found)).index_add(0, place, values)
    lengths = values.new_zeros(len(found)).index_add(0, place, torch.ones_like(values))
    return sums.index_select(0, place), lengths.index_select(0, place)  # its backward pass is the same at each run


def summed(loss: Callable[..., Terms], divisor: float = 1.0) -> Callable[..., Terms]:
    """A policy loss whose completions count by the sum of their tokens over a constant.

    The weights must be 1/|o|, so that the loop divides by the number of completions: Σ (v/w)·w / Σ w = Σ v / N.
    """

    def total(logps: torch.Tensor, weights: torch.Tensor, **columns: torch.Tensor) -> Terms:
        terms = loss(logps, weights, **columns)
        return Terms(terms.values / (terms.weights * divisor), terms.weights, terms.extras)

    return total
