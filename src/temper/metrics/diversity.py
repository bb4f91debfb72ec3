"""Whether a model's texts are still many: likeness to one another, loops, equal openings.

A policy that learns from rewards may find one text that pays and write it for every prompt. Metrics of single texts
(`distinct_2`, `repetition`) do not see that; these do. Rows are predictions, each against the others, so an interval
over rows takes the others as given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from temper.metrics.table import register
from temper.metrics.words import SIGNATURE, ngrams, words
from temper.types import Outputs, Scores

ORDER = 4  # n-grams of BLEU
FLOOR = 0.1  # matches that an order without any counts as having (Chen and Cherry 2014, smoothing 1)
OPENING = 5  # words


@register("self_bleu")
def self_bleu(outputs: Outputs, *, references: int = 20) -> dict[str, Scores]:
    """BLEU of each prediction with others as its references, averaged: 1 where all are the same. Lower is better.

    Zhu et al. 2018 ("Texygen"), who take all others as references; here each has the same fixed sample of them in every
    model, for time and because BLEU rises with their number. Sentence BLEU-4 of words, orders that a short text lacks left
    out. An empty prediction scores 1 if one of its references is empty, else 0.

    Args:
        references: how many others each prediction is compared with.
    """
    rows = self_bleu_rows([words(text) for text in outputs.predictions], references)
    signature = f"self_bleu|4-grams|floor:{FLOOR}|references:{references}|rows:{len(rows)}|{SIGNATURE}"
    return {"self_bleu": Scores.mean(rows, signature, higher_is_better=False)}


@register("loop_share")
def loop_share(outputs: Outputs) -> dict[str, Scores]:
    """Share of predictions that loop: up to 20 words, repeated back to back 3 times or more, 6 words at least.

    "very, very, very good" is no loop; "so good so good so good" is one.
    """
    rows = np.array([loops(words(text)) for text in outputs.predictions], dtype=np.float64)
    return {"loop_share": Scores.mean(rows, f"loop_share|20x3|6|{SIGNATURE}", higher_is_better=False)}


@register("same_opening")
def same_opening(outputs: Outputs) -> dict[str, Scores]:
    """Share of predictions whose first 5 words another prediction begins with too.

    A shorter one counts with all its words. The share rises with the number of predictions.
    """
    rows = same_opening_rows([words(text) for text in outputs.predictions])
    signature = f"same_opening|{OPENING} words|rows:{len(rows)}|{SIGNATURE}"
    return {"same_opening": Scores.mean(rows, signature, higher_is_better=False)}


def self_bleu_rows(texts: Sequence[list[str]], references: int) -> np.ndarray:
    """BLEU of each text against a fixed sample of the others [N]; 0 for a text that is alone."""
    grams = [[Counter(ngrams(t, n)) for n in range(1, ORDER + 1)] for t in texts]
    chosen = _others(len(texts), references)
    return np.array(
        [
            _bleu(len(texts[i]), grams[i], [len(texts[j]) for j in others], [grams[j] for j in others])
            for i, others in enumerate(chosen)
        ]
    )


def _others(n: int, references: int) -> list[list[int]]:
    """For each of n texts the references it is compared with: the same for every model, each as often as any other."""
    rng = np.random.default_rng(0)
    place = rng.permutation(n)
    shifts = rng.permutation(np.arange(1, n))[:references] if n > 1 else []
    at = np.argsort(place)
    return [[int(at[(place[i] + s) % n]) for s in shifts] for i in range(n)]


def _bleu(
    length: int,
    grams: Sequence[Counter[tuple[str, ...]]],
    reference_lengths: Sequence[int],
    references: Sequence[Sequence[Counter[tuple[str, ...]]]],
) -> float:
    """Sentence BLEU (Papineni et al. 2002) over the orders that the text has, in 0…1.

    Each n-gram's matches are bounded by the most that one reference has; brevity is measured by the reference nearest
    in length, the shorter of two.
    """
    if not length or not references:
        return float(bool(references) and min(reference_lengths) == 0)
    orders = min(ORDER, length)
    logs, matched = 0.0, False
    for n in range(orders):
        most = dict[tuple[str, ...], int]()  # of each n-gram of the text, in one reference
        for r in references:
            for gram in grams[n].keys() & r[n].keys():
                most[gram] = max(most.get(gram, 0), r[n][gram])
        found = sum(min(grams[n][gram], count) for gram, count in most.items())
        matched = matched or found > 0
        logs += math.log((found or FLOOR) / (length - n))
    nearest = min(reference_lengths, key=lambda r: (abs(r - length), r))
    return math.exp(logs / orders + min(0.0, 1 - nearest / length)) if matched else 0.0


def loops(text: Sequence[str], *, longest: int = 20, times: int = 3, least: int = 6) -> bool:
    """Whether a run of at most `longest` words follows on itself `times` times or more, over `least` words in all.

    >>> loops("so good so good so good".split()), loops("very very very good".split())
    (True, False)
    """
    codes = {w: k for k, w in enumerate(dict.fromkeys(text))}
    a = np.array([codes[w] for w in text])
    for period in range(1, min(longest, len(a) // times) + 1):
        equal = a[period:] == a[:-period]
        needed = max(times * period, least) - period  # equal pairs in a row: the repeated text is `period` longer
        if np.count_nonzero(equal) >= needed:  # most texts are done with here
            edges = np.flatnonzero(np.diff(np.concatenate([[0], equal, [0]]).astype(np.int8)))
            if (edges[1::2] - edges[::2]).max(initial=0) >= needed:
                return True
    return False


def same_opening_rows(texts: Sequence[list[str]]) -> np.ndarray:
    """1 where another text begins with the same words [N]."""
    openings = [tuple(t[:OPENING]) for t in texts]
    count = Counter(openings)
    return np.array([float(count[o] > 1) for o in openings])


def variety_of(texts: Sequence[str], *, most: int = 32, references: int = 4) -> dict[str, float | None]:
    """The same of a rollout's completions, in a few milliseconds: self-BLEU of `most` of them alone, from all over.

    `self_bleu` has fewer references than the metric, so that the two numbers differ.
    """
    split = [words(text) for text in texts]
    pairs = [ngrams(t, 2) for t in split]
    some = [split[i] for i in np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)]
    distinct = [len(set(run)) / len(run) for run in pairs if run]
    return {
        "distinct_2": float(np.mean(distinct)) if distinct else None,
        "self_bleu": float(self_bleu_rows(some, references).mean()) if len(split) > 1 else None,
        "loop_share": float(np.mean([loops(t) for t in split])),
        "same_opening": float(same_opening_rows(split).mean()),
    }


def collapsing(lines: Sequence[dict[str, Any]], *, distinct_2: float, variety: float) -> str | None:
    """What to warn of, if over these rollouts (oldest first) rewards rise while variety falls, and below a threshold.

    Means of the later half are set against means of the earlier one. Variety is distinct_2, and 1 − self_bleu.
    """
    half = len(lines) // 2

    def moved(values: Sequence[float | None]) -> tuple[float, float]:
        parts = [[v for v in part if v is not None] for part in (values[:half], values[-half:])]
        before, after = (float(np.mean(p)) if p else math.nan for p in parts)
        return before, after

    before, after = moved([x["reward"] for x in lines])
    if not after > before:
        return None
    likeness = [x.get("self_bleu") for x in lines]
    measured = {
        f"distinct_2 falls below {distinct_2:g} (texts repeat themselves)": (
            moved([x.get("distinct_2") for x in lines]), distinct_2,
        ),
        f"1 − self_bleu falls below {variety:g} (texts are alike)": (
            moved([None if v is None else 1 - v for v in likeness]), variety,
        ),
    }  # fmt: skip
    found = [what for what, ((early, late), least) in measured.items() if late < early and late < least]
    if not found:
        return None
    return (
        f"rewards rise while {' and '.join(found)}: the policy may have found what pays and lose the rest; "
        "look at samples.jsonl, and hold it with more kl.beta or fewer steps"
    )
