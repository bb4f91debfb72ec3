"""Losses of pairs of answers to one prompt, a chosen and a rejected one, held to a reference model. Legend: P pairs.

Each is a function of `Compared`, the log-probabilities of whole answers, and gives a value to each pair, unreduced. In
the docstrings r_c and r_r are the log-ratios log π(y)/π_ref(y) of the chosen and the rejected answer, |y_c| and |y_r|
their tokens, σ the logistic function. Defaults are those of each paper where it has one, else β = 0.1.

All agree with TRL 1.16 in value and gradient, but for what the docstrings name. `docs/losses.md` says what each is for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch.nn.functional import logsigmoid

from temper.registry import Registry

Positive = Annotated[float, Gt(0)]
Flipped = Annotated[float, Ge(0), Lt(0.5)]  # a share of wrong labels; at a half they say nothing


@dataclasses.dataclass(frozen=True)
class Compared:
    """Log-probabilities of whole answers, nats, and their lengths, all float [P].

    Args:
        chosen, rejected: sums over the answer's tokens under the policy, with gradient.
        ref_chosen, ref_rejected: the same under the reference, without; zeros where no loss reads them.
        chosen_length, rejected_length: tokens of each answer, at least 1.

    Raises:
        ValueError: the six are not of one length, and would have been stretched to another's without a word.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {f.name: tuple(getattr(self, f.name).shape) for f in dataclasses.fields(self)}
        if len(set(shapes.values())) > 1 or self.chosen.dim() != 1:
            raise ValueError(f"a pair has six numbers, one in each tensor [P]; shapes are {shapes}")

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log π(y_c) − log π_ref(y_c), nats [P]; times β it is the implicit reward."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """log π(y_r) − log π_ref(y_r), nats [P]."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> torch.Tensor:
        """r_c − r_r, nats [P]: how much further the chosen answer has risen than the rejected one."""
        return self.chosen_ratio - self.rejected_ratio


# One pair, and two, on which the docstrings are worked: chosen, rejected, both under the reference, lengths.
ONE = Compared(*torch.tensor([[-1.0], [-3.0], [-2.0], [-2.0], [2.0], [4.0]]))  # r_c = 1, r_r = −1
TWO = Compared(*torch.tensor([[-1.0, -3.0], [-2.0, -1.0], [-2.0, -2.0], [-1.0, -2.0], [1.0, 1.0], [1.0, 1.0]]))

preference_losses: Registry[Callable[..., torch.Tensor]] = Registry("preference loss")


def smoothed(x: torch.Tensor, flipped: float) -> torch.Tensor:
    """−(1 − ε)·log σ(x) − ε·log σ(−x): the logistic loss of a label that is wrong with the probability ε."""
    return -(1 - flipped) * logsigmoid(x) - flipped * logsigmoid(-x) if flipped else -logsigmoid(x)


@preference_losses.register("sigmoid")
def sigmoid(pairs: Compared, *, beta: Positive = 0.1, label_smoothing: Flipped = 0.0) -> torch.Tensor:
    """DPO: value = −log σ(β(r_c − r_r)), ln 2 at the reference.

    Rafailov et al. 2023 ("Direct preference optimization"), equation 7. With label_smoothing ε the conservative DPO of
    Mitchell 2023 ("A note on DPO with noisy preferences"); TRL's DPOTrainer leaves ε out here.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share ε of pairs that are taken to be the wrong way round.

    >>> round(float(sigmoid(ONE, beta=1.0)), 4)  # ln(1 + e⁻²)
    0.1269
    """
    return smoothed(beta * pairs.margin, label_smoothing)


@preference_losses.register("robust")
def robust(pairs: Compared, *, beta: Positive = 0.1, label_smoothing: Flipped = 0.1) -> torch.Tensor:
    """Robust DPO: value = (−(1 − ε)·log σ(h) + ε·log σ(−h)) / (1 − 2ε), h = β(r_c − r_r).

    Chowdhury et al. 2024 ("Provably robust DPO"), section 3.1: its expectation over labels flipped with the probability
    ε is DPO's loss on the true ones. It may be negative.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share ε of pairs that are the wrong way round.

    >>> round(float(robust(ONE, beta=1.0)), 4)  # (0.9·0.12693 − 0.1·2.12693) / 0.8
    -0.1231
    """
    h, flipped = beta * pairs.margin, label_smoothing
    return (flipped * logsigmoid(-h) - (1 - flipped) * logsigmoid(h)) / (1 - 2 * flipped)


@preference_losses.register("hinge")
def hinge(pairs: Compared, *, beta: Positive = 0.1) -> torch.Tensor:
    """A margin is enough: value = max(0, 1 − β(r_c − r_r)).

    Zhao et al. 2023 ("SLiC-HF"), section 2, on log-ratios as Liu et al. 2024 ("Statistical rejection sampling") have it.

    Args:
        beta: one over the margin, in nats, beyond which a pair teaches nothing.

    >>> float(hinge(ONE, beta=0.25))
    0.5
    """
    return torch.relu(1 - beta * pairs.margin)


@preference_losses.register("ipo")
def ipo(pairs: Compared, *, beta: Positive = 0.1) -> torch.Tensor:
    """The margin is drawn to 1/2β, and not beyond: value = (r_c/|y_c| − r_r/|y_r| − 1/2β)².

    Azar et al. 2023 ("A general theoretical paradigm"), equation 17, where β is τ. The paper writes whole log-ratios;
    means over tokens are TRL's, to whom its authors have confirmed that their results were made so.

    Args:
        beta: the smaller, the wider the margin that is sought.

    >>> float(ipo(ONE, beta=1.0))  # (1/2 + 1/4 − 1/2)²
    0.0625
    """
    return (_per_token(pairs) - 1 / (2 * beta)).square()


@preference_losses.register("exo_pair")
def exo_pair(
    pairs: Compared, *, beta: Positive = 0.1, label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3
) -> torch.Tensor:
    """Reverse KL to the labels: value = q·log(q/(1 − ε)) + (1 − q)·log((1 − q)/ε), q = σ(β(r_c − r_r)).

    Ji et al. 2024 ("Towards efficient exact optimization"), equation 16 for two answers. DPO is the forward KL.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share ε of pairs that are taken to be the wrong way round; the KL to a sure label is infinite.

    >>> round(float(exo_pair(ONE, beta=1.0, label_smoothing=0.1)), 4)  # 0.8808·ln(0.8808/0.9) + 0.1192·ln(0.1192/0.1)
    0.0019
    """
    h = beta * pairs.margin
    right = torch.sigmoid(h) * (logsigmoid(h) - math.log1p(-label_smoothing))
    return right + torch.sigmoid(-h) * (logsigmoid(-h) - math.log(label_smoothing))


@preference_losses.register("nca_pair")
def nca_pair(pairs: Compared, *, beta: Positive = 0.01) -> torch.Tensor:
    """Noise contrast, each answer by itself: value = −log σ(βr_c) − ½·log σ(−βr_c) − ½·log σ(−βr_r).

    Chen et al. 2024 ("Noise contrastive alignment"), section 4.1, where β is α. It keeps the likelihood of the chosen
    answer from falling, which a loss of the difference does not see.

    Args:
        beta: how strongly the policy is held to the reference.

    >>> round(float(nca_pair(ONE, beta=1.0)), 4)  # 0.31326 + 1.31326/2 + 0.31326/2
    1.1265
    """
    won, lost = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -logsigmoid(won) - (logsigmoid(-won) + logsigmoid(-lost)) / 2


@preference_losses.register("bco_pair")
def bco_pair(pairs: Compared, *, beta: Positive = 0.01, delta: float | Literal["batch"] = "batch") -> torch.Tensor:
    """A classifier of single answers: value = −log σ(βr_c − δ) − log σ(δ − βr_r).

    Jung et al. 2024 ("Binary classifier optimization"), section 4. δ is the mean of the mean rewards of either side; the
    paper takes a running mean, here it is that of the pairs given, so that a step depends on nothing before it. TRL 1.16
    has no δ: `delta: 0` is its loss.

    Args:
        beta: how strongly the policy is held to the reference.
        delta: the reward that tells good from bad; batch: the mean of all rewards of the step, without gradient.

    >>> round(float(bco_pair(ONE, beta=1.0, delta=1.0)), 4)  # ln 2 + ln(1 + e⁻²)
    0.8201
    """
    won, lost = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    between = (won + lost).detach().mean() / 2 if delta == "batch" else delta
    return -logsigmoid(won - between) - logsigmoid(between - lost)


@preference_losses.register("sppo_hard")
def sppo_hard(pairs: Compared, *, beta: Positive = 1e-3) -> torch.Tensor:
    """Self-play with sure labels: value = (r_c − 1/2β)² + (r_r + 1/2β)².

    Wu et al. 2024 ("Self-play preference optimization"), equation 4.7 with β = 1/η and a probability of winning of 1 and 0.

    Args:
        beta: one over the paper's η; the log-ratios are drawn to ± 1/2β.

    >>> float(sppo_hard(ONE, beta=1.0))
    0.5
    """
    return (pairs.chosen_ratio - 0.5 / beta).square() + (pairs.rejected_ratio + 0.5 / beta).square()


@preference_losses.register("aot")
def aot(pairs: Compared, *, beta: Positive = 0.1, label_smoothing: Flipped = 0.0) -> torch.Tensor:
    """DPO's loss between quantiles: the step's m(π) = log π(y_c)/π(y_r), in order, against its m(π_ref), in order.

    Melnyk et al. 2024 ("Distributional preference alignment"), section 3, paired: value = −log σ(β(m(π) − m(π_ref)'))
    with m(π_ref)' of the same rank. The value is given to the pair whose m(π) it is. Needs all pairs of a step at once.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share of pairs that are taken to be the wrong way round.

    >>> [round(v, 4) for v in aot(TWO, beta=1.0).tolist()]  # m = 1, −2 against 0, −1: ln(1 + e⁻¹), ln(1 + e)
    [0.3133, 1.3133]
    """
    ours, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return smoothed(beta * (ours - of_same_rank(reference, ours)), label_smoothing)


@preference_losses.register("aot_unpaired")
def aot_unpaired(pairs: Compared, *, beta: Positive = 0.1, label_smoothing: Flipped = 0.0) -> torch.Tensor:
    """DPO's loss between quantiles: the step's r_c, in order, against its r_r, in order; who stood with whom is lost.

    Melnyk et al. 2024 ("Distributional preference alignment"), section 3, unpaired. The value is given to the pair
    whose r_c it is. Needs all pairs of a step at once.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share of pairs that are taken to be the wrong way round.

    >>> [round(v, 4) for v in aot_unpaired(TWO, beta=1.0).tolist()]  # r_c = 1, −1 against r_r = 1, −1: ln 2 twice
    [0.6931, 0.6931]
    """
    won, lost = pairs.chosen_ratio, pairs.rejected_ratio
    return smoothed(beta * (won - of_same_rank(lost, won)), label_smoothing)


@preference_losses.register("apo_zero")
def apo_zero(pairs: Compared, *, beta: Positive = 0.1) -> torch.Tensor:
    """Chosen up, rejected down, each by itself: value = 1 − σ(βr_c) + σ(βr_r).

    D'Oosterlinck et al. 2024 ("Anchored preference optimization"), equation 7: for chosen answers better than the model's own.

    Args:
        beta: how strongly the policy is held to the reference.

    >>> round(float(apo_zero(ONE, beta=1.0)), 4)  # 2·0.26894
    0.5379
    """
    return torch.sigmoid(-beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


@preference_losses.register("apo_down")
def apo_down(pairs: Compared, *, beta: Positive = 0.1) -> torch.Tensor:
    """Both down, the rejected one further: value = σ(βr_c) + 1 − σ(β(r_c − r_r)).

    D'Oosterlinck et al. 2024 ("Anchored preference optimization"), equation 8: for chosen answers worse than the model's own.

    Args:
        beta: how strongly the policy is held to the reference.

    >>> round(float(apo_down(ONE, beta=1.0)), 4)  # 0.73106 + 1 − 0.88080
    0.8503
    """
    return torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(-beta * pairs.margin)


@preference_losses.register("discopop")
def discopop(pairs: Compared, *, beta: Positive = 0.05, tau: Positive = 0.05) -> torch.Tensor:
    """Logistic where the order is wrong, exponential where it is right: value = −(1 − m)·log σ(h) + m·e⁻ʰ, m = σ(h/τ).

    Lu et al. 2024 ("Discovering preference optimization algorithms"), equation 5, h = β(r_c − r_r). Not
    convex: with the paper's τ the slope at the reference points the wrong way. The product m·e⁻ʰ is taken in the
    exponent: multiplied out, as in TRL, it is 0·∞ below h = −89 in float32.

    Args:
        beta: how strongly the policy is held to the reference.
        tau: how sharply one form passes into the other.

    >>> round(float(discopop(ONE, beta=1.0, tau=1.0)), 4)  # 0.11920·0.12693 + 0.88080·e⁻²
    0.1343
    """
    h = beta * pairs.margin
    return -torch.sigmoid(-h / tau) * logsigmoid(h) + (logsigmoid(h / tau) - h).exp()


@preference_losses.register("sigmoid_norm")
def sigmoid_norm(pairs: Compared, *, beta: Positive = 5.0, label_smoothing: Flipped = 0.0) -> torch.Tensor:
    """Length-normalised DPO: value = −log σ(β(r_c/|y_c| − r_r/|y_r|)).

    Lambert et al. 2024 ("Tülu 3"), section 5. Log-ratios of tokens are small, so β is some fifty times DPO's.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: share of pairs that are taken to be the wrong way round.

    >>> round(float(sigmoid_norm(ONE, beta=1.0)), 4)  # ln(1 + e^−(1/2 + 1/4))
    0.3869
    """
    return smoothed(beta * _per_token(pairs), label_smoothing)


def _per_token(pairs: Compared) -> torch.Tensor:
    """r_c/|y_c| − r_r/|y_r|, nats a token [P]."""
    return pairs.chosen_ratio / pairs.chosen_length - pairs.rejected_ratio / pairs.rejected_length


def of_same_rank(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """For each of `other` the one of `values` that has its rank, both [P]; with the gradient of `values`.

    >>> of_same_rank(torch.tensor([7.0, 5.0, 6.0]), torch.tensor([0.1, 0.2, 0.3])).tolist()
    [5.0, 6.0, 7.0]
    """
    rank = other.argsort(stable=True).argsort()
    return values.sort(stable=True).values.index_select(0, rank)
