"""What Temper raises. Every message says what happened, where, and what to do.

TemperError
├── RecipeError      the recipe, a flag or a name in it
├── DataError        a source, a row, a split
├── ModelError       weights, tokenizer, template, adapter
├── RunError         the run folder, the disk, a damaged file
└── TrainingError    a tripwire: the run would have ended well and the model been wrong
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TemperError(Exception):
    """Base of all errors that are the user's to solve; shown without a traceback.

    Args:
        what: what happened, one sentence.
        where: file and line, row, or key.
        do: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = what, where, do
        lines = [what] + ([f"where: {where}"] if where else []) + ([f"do: {do}"] if do else [])
        super().__init__("\n".join(lines))


class RecipeError(TemperError):
    """The recipe cannot be run as written."""


class DataError(TemperError):
    """A data source or a row in it cannot be used."""


class ModelError(TemperError):
    """A model, a tokenizer or an adapter cannot be used."""


class RunError(TemperError):
    """The run folder cannot be read or written."""


class TrainingError(TemperError):
    """Training was stopped because it could only have gone wrong."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean «lr»?' or the list of what there is.

    >>> nearest("leraning_rate", ["learning_rate", "beta"])
    'did you mean «learning_rate»?'
    >>> nearest("zzz", ["a", "b"])
    'known: a, b'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean «{close[0]}»?" if close else "known: " + ", ".join(sorted(known))
