"""METEOR (Banerjee and Lavie 2005, "METEOR: an automatic metric for MT evaluation"): words aligned with a reference.

With the parameters of Lavie and Agarwal 2007, which are nltk's. Alignment and formula are nltk's own; words come from
`temper.metrics.words` and stems from `temper.metrics.stems`, so that it is not blind to scripts other than Latin.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from temper.metrics.stems import STEMMERS, Language, language_of, stem
from temper.metrics.table import register
from temper.metrics.words import SIGNATURE, require_words, words
from temper.types import Outputs, Scores

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5  # recall's weight, the penalty's exponent, the penalty's weight


class _Stemmer:
    """What nltk takes as `stemmer=`."""

    def __init__(self, language: Language | None) -> None:
        self.language: Language | None = language

    def stem(self, word: str) -> str:
        return stem(word, self.language) if self.language else word


class _NoSynonyms:
    """What nltk takes as `wordnet=` where there is none."""

    def synsets(self, word: str) -> list[Any]:
        return []


@register("meteor")
def meteor(
    outputs: Outputs, *, language: Literal["auto", "en", "ru", "uk", "none"] = "auto", synonyms: bool = True
) -> dict[str, Scores]:
    """METEOR, 0 to 1: words, stems and synonyms shared with the reference, recall first, less where order is torn.

    Words are aligned in three passes: equal ones, then of those left over equal stems, then synonyms (of stems: nltk's
    third pass goes on with what the second one left). With m aligned of a
    prediction's and a reference's words, precision P and recall R, in c runs: P·R / (0.9·P + 0.1·R) · (1 − 0.5·(c/m)³).
    A text of m words against itself scores 1 − 0.5/m³.

    Args:
        language: whose stems are compared. auto goes by the letters of each row's reference: Cyrillic with any of іїєґ is
            Ukrainian, with ыэёъ Russian, other scripts English; Cyrillic with neither is judged by the row's prompt, and
            Russian if that has neither too. Name the language where you know it; none compares whole words alone.
        synonyms: ask nltk's WordNet of English rows, if this machine has it; nothing is downloaded. The signature says
            whether it was there.

    Raises:
        DataError: no reference has a word.

    6 words aligned of 7 and of 6, in 2 runs: P = 6/7, R = 1

    >>> out = Outputs([""], ["The cat was sat on the mat"], ["The cat sat on the mat"], [True])
    >>> round(meteor(out, synonyms=False)["meteor"].value, 6)
    0.965392
    >>> round(6 / 7 / (0.9 * 6 / 7 + 0.1) * (1 - 0.5 * (2 / 6) ** 3), 6)
    0.965392
    """
    from nltk.translate.meteor_score import single_meteor_score

    require_words(outputs.references, "METEOR")
    nothing: Any = _NoSynonyms()
    name, wordnet = _wordnet() if synonyms and language in ("auto", "en") else ("none", nothing)
    stemmers: dict[Language | None, Any] = {known: _Stemmer(known) for known in (*STEMMERS, None)}
    rows = []
    for prompt, prediction, reference in zip(outputs.prompts, outputs.predictions, outputs.references, strict=True):
        own = _language(language, reference, prompt)
        scored = single_meteor_score(
            words(reference), words(prediction), preprocess=str, stemmer=stemmers[own],
            wordnet=wordnet if own == "en" else nothing, alpha=ALPHA, beta=BETA, gamma=GAMMA,
        )  # fmt: skip
        rows.append(scored)
    stems = "+".join(f"{k}={v}" for k, v in STEMMERS.items() if language in ("auto", k)) or "no"
    tail = f"language:{language}|stems:{stems}|synonyms:{name}|{SIGNATURE}|nltk:{version('nltk')}"
    signature = f"meteor|alpha:{ALPHA}|beta:{BETA:g}|gamma:{GAMMA}|{tail}"
    return {"meteor": Scores.mean(np.array(rows, dtype=np.float64), signature)}


def _language(asked: str, reference: str, prompt: str) -> Language | None:
    if asked == "auto":
        return language_of(reference, prompt)
    return next((known for known in STEMMERS if known == asked), None)


@functools.cache
def _wordnet() -> tuple[str, Any]:
    """Its name with its version, and nltk's reader of it; none and an empty one where it is not installed."""
    from nltk.corpus import wordnet

    try:
        return f"wordnet-{wordnet.get_version()}", wordnet
    except LookupError:
        return "none", _NoSynonyms()
