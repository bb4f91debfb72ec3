"""ROUGE (Lin 2004, "ROUGE: a package for automatic evaluation of summaries"): words shared with a reference.

The scores are rouge-score's own, F-measure; only the words come from `temper.metrics.words`, because rouge-score's
default tokenizer drops every letter outside a–z: there two equal Ukrainian sentences score 0, and two different ones
that share a number score 1.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal, get_args

import numpy as np

from temper.metrics.table import register
from temper.metrics.words import SIGNATURE, require_words, words
from temper.types import Outputs, Scores

Variant = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
ALL: list[Variant] = list(get_args(Variant))


class _Words:
    """What RougeScorer takes as `tokenizer=`."""

    def __init__(self, stem: bool) -> None:
        self.stem = stem

    def tokenize(self, text: str) -> list[str]:
        return words(text, stem=self.stem)


def _variants(*, variant: Variant | list[Variant], stem: bool) -> list[str]:
    return list(dict.fromkeys([variant] if isinstance(variant, str) else variant))


@register("rouge", gives=_variants)
def rouge(outputs: Outputs, *, variant: Variant | list[Variant] = ALL, stem: bool = False) -> dict[str, Scores]:
    """ROUGE-1, -2, -L and -Lsum, F-measure: words, word pairs, longest word sequences shared with the reference.

    Args:
        variant: one of them or a list.
        stem: compare Porter stems of English words.

    Raises:
        DataError: no reference has a word, so every score would be 0 whatever the model wrote.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk and scipy.stats: two seconds

    require_words(outputs.references, "ROUGE")
    names = _variants(variant=variant, stem=stem)
    scorer = RougeScorer(names, tokenizer=_Words(stem))
    scored = [scorer.score(r, p) for r, p in zip(outputs.references, outputs.predictions, strict=True)]
    tail = f"f|{SIGNATURE}|stem:{'porter' if stem else 'no'}|rouge-score:{version('rouge-score')}"
    return {name: Scores.mean(np.array([score[name].fmeasure for score in scored]), f"{name}|{tail}") for name in names}


@register("rouge1")
def rouge1(outputs: Outputs, *, stem: bool = False) -> dict[str, Scores]:
    """ROUGE-1 F-measure: words shared with the reference."""
    return rouge(outputs, variant="rouge1", stem=stem)


@register("rouge2")
def rouge2(outputs: Outputs, *, stem: bool = False) -> dict[str, Scores]:
    """ROUGE-2 F-measure: pairs of neighbouring words shared with the reference."""
    return rouge(outputs, variant="rouge2", stem=stem)


@register("rougeL")
def rouge_l(outputs: Outputs, *, stem: bool = False) -> dict[str, Scores]:
    """ROUGE-L F-measure: the longest sequence of words, gaps allowed, shared with the reference."""
    return rouge(outputs, variant="rougeL", stem=stem)


@register("rougeLsum")
def rouge_lsum(outputs: Outputs, *, stem: bool = False) -> dict[str, Scores]:
    """ROUGE-Lsum F-measure: ROUGE-L of summaries with one sentence a line, each line matched against all others."""
    return rouge(outputs, variant="rougeLsum", stem=stem)
