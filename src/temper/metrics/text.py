"""What can be said of a prediction without its reference: how long, how varied, how repetitive, ended or cut."""

from __future__ import annotations

import numpy as np

from temper.metrics.table import register
from temper.metrics.words import SIGNATURE, ngrams, words
from temper.types import Outputs, Scores


def mean_of_defined(sums: np.ndarray) -> np.ndarray:
    """[..., 2] of (scores, rows that have one) → their mean [...]; nan where no row has one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


@register("length")
def length(outputs: Outputs) -> dict[str, Scores]:
    """Words in a prediction, on average."""
    rows = np.array([len(words(text)) for text in outputs.predictions], dtype=np.float64)
    return {"length": Scores.mean(rows, f"length|words|{SIGNATURE}", higher_is_better=None)}


def _distinct(outputs: Outputs, n: int) -> dict[str, Scores]:
    runs = [ngrams(words(text), n) for text in outputs.predictions]
    rows = np.array([len(set(run)) / len(run) if run else np.nan for run in runs])
    defined = ~np.isnan(rows)
    stats = np.stack([np.where(defined, rows, 0.0), defined.astype(np.float64)], -1)
    name = f"distinct_{n}"
    signature = f"{name}|within:text|short:left-out|{SIGNATURE}"
    return {name: Scores(stats, rows, signature, True, mean_of_defined)}


@register("distinct_1")
def distinct_1(outputs: Outputs) -> dict[str, Scores]:
    """Share of a prediction's words that are different words, averaged over predictions.

    Within each text, not over all texts together as in Li et al. 2016 ("A diversity-promoting objective function"):
    theirs falls as texts are added. Longer texts score lower. An empty text has no score and is left out of the mean;
    nan where all are empty.
    """
    return _distinct(outputs, 1)


@register("distinct_2")
def distinct_2(outputs: Outputs) -> dict[str, Scores]:
    """Share of a prediction's word pairs that are different pairs, averaged over predictions.

    As distinct_1; a text of fewer than two words has no score and is left out of the mean.
    """
    return _distinct(outputs, 2)


@register("repetition")
def repetition(outputs: Outputs) -> dict[str, Scores]:
    """Share of a prediction's runs of 4 words that repeat an earlier one, averaged over predictions.

    seq-rep-4 of Welleck et al. 2020 ("Neural text generation with unlikelihood training"), in words. A text of fewer
    than four words repeats nothing and scores 0: left out, one looping answer among short ones would be all there is.
    """
    runs = [ngrams(words(text), 4) for text in outputs.predictions]
    rows = np.array([1 - len(set(run)) / len(run) if run else 0.0 for run in runs])
    return {"repetition": Scores.mean(rows, f"repetition|4-grams|within:text|{SIGNATURE}", higher_is_better=False)}


@register("ended")
def ended(outputs: Outputs) -> dict[str, Scores]:
    """Share of predictions that the model ended itself, not the length limit."""
    return {"ended": Scores.mean(np.array(outputs.ended, dtype=np.float64), "ended|share")}
