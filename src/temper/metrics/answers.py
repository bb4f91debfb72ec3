"""Short answers against a reference: the same or not, and how many words are.

After SQuAD (Rajpurkar et al. 2016, "SQuAD: 100,000+ questions for machine comprehension of text"), for any script and
for numbers: SQuAD's script deletes the punctuation of ASCII alone, so that «Київ» in quotes is not Київ, and it deletes
it everywhere, so that 3.5 is 35 and -5 is 5.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from temper.errors import DataError
from temper.metrics.table import register
from temper.metrics.words import LETTER_APOSTROPHES, composed, spaced
from temper.types import Outputs, Scores

Ignored = Literal["case", "punctuation", "articles"]
DEFAULT: list[Ignored] = ["case", "punctuation"]
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


@register("exact_match")
def exact_match(outputs: Outputs, *, ignore: list[Ignored] = DEFAULT) -> dict[str, Scores]:
    """Share of predictions equal to their reference but for case, punctuation and white space.

    Args:
        ignore: any of case, punctuation and articles (English a, an, the, which SQuAD leaves out too); white space and
            how a letter is composed never count. Punctuation within a number and the sign before it stay, and so do
            symbols such as + and $.

    Raises:
        DataError: nothing is left of any reference.

    >>> out = Outputs([""] * 3, ["«Київ».", "the cat", "5"], ["київ", "cat", "-5"], [True] * 3)
    >>> exact_match(out)["exact_match"].rows.tolist(), exact_match(out, ignore=["articles"])["exact_match"].rows.tolist()
    ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    """
    pairs = _normalised(outputs, ignore)
    rows = np.array([prediction == reference for prediction, reference in pairs], dtype=np.float64)
    return {"exact_match": Scores.mean(rows, _signature("exact_match", ignore))}


@register("token_f1")
def token_f1(outputs: Outputs, *, ignore: list[Ignored] = DEFAULT) -> dict[str, Scores]:
    """F1 of the words that a prediction shares with its reference, in whatever order, averaged over predictions.

    A word is what stands between spaces once text is normalised as for exact_match; of scripts written without spaces it
    is a character. Where either text is empty it is 1 if both are, else 0.

    Args:
        ignore: as for exact_match.

    Raises:
        DataError: nothing is left of any reference.

    2 words shared of 4 and of 3: 2 · 1/2 · 2/3 / (1/2 + 2/3) = 4/7

    >>> out = Outputs([""], ["Eiffel tower in Paris"], ["the Eiffel Tower"], [True])
    >>> token_f1(out)["token_f1"].value == 4 / 7
    True
    """
    pairs = _normalised(outputs, ignore)
    rows = np.array([_f1(spaced(prediction).split(), spaced(reference).split()) for prediction, reference in pairs])
    return {"token_f1": Scores.mean(rows, _signature("token_f1", ignore))}


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    if not prediction or not reference:
        return float(not prediction and not reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))


def _signature(name: str, ignore: Sequence[Ignored]) -> str:
    return f"{name}|ignored:{'+'.join(sorted(set(ignore))) or 'nothing'}|punctuation:unicode"


def _normalised(outputs: Outputs, ignore: Sequence[Ignored]) -> list[tuple[str, str]]:
    """Predictions with their references."""
    references = [normalise(text, ignore) for text in outputs.references]
    if not any(references):
        raise DataError("nothing is left of any reference to compare with", do="check the column, and what is ignored")
    return [(normalise(p, ignore), r) for p, r in zip(outputs.predictions, references, strict=True)]


def normalise(text: str, ignore: Sequence[Ignored] = DEFAULT) -> str:
    """A text without what is ignored, its words one space apart.

    >>> normalise("  П’ять — або  3.5 % (−5)!")
    'пять або 3.5 -5'
    """
    text = composed(text.casefold() if "case" in ignore else text)
    if "punctuation" in ignore:
        dashes, marks = _punctuation()
        text = marks.sub("", dashes.sub("-", text))
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


@functools.cache
def _punctuation() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Dashes of all lengths, and punctuation that is neither between digits nor a number's sign.

    Apostrophes that Unicode counts among letters or symbols are punctuation too: п'ять, п’ять and пʼять are one word.
    """
    found = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("P")}
    dashes = {c for c in found if unicodedata.category(c) == "Pd"} | {"\u2212"}
    every = re.escape("".join(sorted(found | set(LETTER_APOSTROPHES) | set("`\u00b4"))))
    signed = r"(?!(?<!\w)-\d)"
    return re.compile(f"[{''.join(map(re.escape, sorted(dashes)))}]"), re.compile(
        rf"{signed}(?:(?<!\d)[{every}]|[{every}](?!\d))"
    )
