"""Which of two answers a model prefers, and whose answers are preferred: by a reward model, or by a judge.

A policy prefers the answer that it finds more probable. Against a reference it prefers by its implicit reward, what
training made more probable: r(x, y) = log π(y|x) − log π_ref(y|x), up to the factor β and what depends on x alone
(Rafailov et al. 2023, equation 5). A summed log-probability favours short answers, a mean one does not (Meng et al. 2024).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from temper.metrics.table import register
from temper.types import Outputs, Scores

By = Literal["sum", "mean"]
REWARD_MODEL = "reward_model"  # the judge that is a key of the evaluation


def differences(pairs: np.ndarray | None, tokens: np.ndarray | None, by: By) -> np.ndarray:
    """Log-probability of the chosen answer less that of the rejected one, nats [N]; of their tokens' means by `mean`."""
    if pairs is None or tokens is None:
        raise ValueError("preferences need outputs.pairs and outputs.pair_tokens")
    with np.errstate(divide="ignore", invalid="ignore"):  # a pair that was not scored has no tokens
        each = pairs if by == "sum" else pairs / tokens
    return each[:, 0] - each[:, 1]


def halved(differences: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, 0.5 at 0; nan stays.

    >>> halved(np.array([2.0, -1.0, 0.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (np.sign(differences) + 1) / 2


def _implicit(outputs: Outputs, by: By) -> np.ndarray | None:
    if outputs.reference_pairs is None or outputs.pairs is None:
        return None
    return differences(outputs.pairs - outputs.reference_pairs, outputs.pair_tokens, by)


@register("preference_accuracy", reads="pairs", also=("implicit_accuracy",))
def preference_accuracy(outputs: Outputs, *, by: By = "sum") -> dict[str, Scores]:
    """Share of pairs whose chosen answer the model finds more probable than the rejected one; ties count half.

    Log-probabilities of whole answers, or of their tokens on average (`by: mean`). Where the evaluation names a reference,
    `implicit_accuracy` is the same of implicit rewards.

    >>> out = Outputs([""] * 2, [""] * 2, [""] * 2, [True] * 2, pairs=np.array([[-4.0, -5.0], [-6.0, -3.0]]),
    ...               pair_tokens=np.array([[2, 2], [6, 2]]))
    >>> preference_accuracy(out)["preference_accuracy"].value, preference_accuracy(out, by="mean")["preference_accuracy"].value
    (0.5, 1.0)
    """
    own, implicit = differences(outputs.pairs, outputs.pair_tokens, by), _implicit(outputs, by)
    found = {"preference_accuracy": Scores.mean_of_known(halved(own), f"preference_accuracy|by:{by}|ties:half")}
    if implicit is not None:
        signature = f"implicit_accuracy|by:{by}|ties:half|reference:{outputs.reference}"
        found["implicit_accuracy"] = Scores.mean_of_known(halved(implicit), signature)
    return found


@register("margin", reads="pairs", also=("implicit_margin",))
def margin(outputs: Outputs, *, by: By = "sum") -> dict[str, Scores]:
    """Mean log-probability of the chosen answer less that of the rejected one, in nats.

    Of whole answers, or of their tokens on average (`by: mean`). Where the evaluation names a reference, `implicit_margin` is
    the same of implicit rewards, without the factor β.

    >>> out = Outputs([""], [""], [""], [True], pairs=np.array([[-4.0, -5.0]]), pair_tokens=np.array([[2, 5]]),
    ...               reference_pairs=np.array([[-4.5, -4.0]]), reference="base")
    >>> {name: s.value for name, s in margin(out).items()}, margin(out, by="mean")["margin"].value
    ({'margin': 1.0, 'implicit_margin': 1.5}, -1.0)
    """
    own, implicit = differences(outputs.pairs, outputs.pair_tokens, by), _implicit(outputs, by)
    unit = "nats" if by == "sum" else "nats/token"
    found = {"margin": Scores.mean_of_known(own, f"margin|{unit}")}
    if implicit is not None:
        found["implicit_margin"] = Scores.mean_of_known(
            implicit, f"implicit_margin|{unit}|reference:{outputs.reference}"
        )
    return found


@register("win_rate", reads="judge")
def win_rate(outputs: Outputs, *, against: str, judge: str = REWARD_MODEL) -> dict[str, Scores]:
    """Share of answers judged better than those of the model `against`; ties count half.

    The judge is the evaluation's `reward_model`, or a model behind an endpoint (URL#MODEL), which is asked in both orders:
    where its two verdicts disagree, that is a tie. The model `against` has 0.5 against itself.

    >>> out = Outputs([""] * 3, [""] * 3, [""] * 3, [True] * 3, wins=np.array([1.0, 0.5, np.nan]), duel="against:base|by:rm")
    >>> win_rate(out, against="base")["win_rate"].value
    0.75
    """
    if outputs.wins is None:
        raise ValueError("win_rate needs outputs.wins")
    return {"win_rate": Scores.mean_of_known(outputs.wins, f"win_rate|{outputs.duel}|ties:half")}
