"""Which predictions hold a word of a list: a second opinion beside a classifier's."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from temper.data.mini import LEXICON
from temper.metrics.table import register
from temper.metrics.words import SIGNATURE
from temper.metrics.words import words as words_of
from temper.types import Outputs, Scores


class _Entries:
    """Entries as runs of words, by the first of them where it is whole."""

    def __init__(self, entries: list[str]) -> None:
        runs = [(tuple(words_of(entry)), entry.endswith("*")) for entry in entries]
        self.whole = {run for run, stem in runs if not stem}
        self.stems = {run for run, stem in runs if stem}
        self.longest = max(len(run) for run, _ in runs)

    def within(self, text: str) -> bool:
        """Whether the text holds any entry."""
        found = words_of(text)
        for at in range(len(found)):
            for n in range(1, min(self.longest, len(found) - at) + 1):
                run = tuple(found[at : at + n])
                if run in self.whole or any(self._begins(run, stem) for stem in self.stems):
                    return True
        return False

    @staticmethod
    def _begins(run: tuple[str, ...], stem: tuple[str, ...]) -> bool:
        return len(run) == len(stem) and run[:-1] == stem[:-1] and run[-1].startswith(stem[-1])


def _gives(words: list[str] | Literal["mini"]) -> list[str]:
    """Nothing of a list that is empty or has an entry without a word, which is told before anything runs."""
    listed = _listed(words)
    return ["lexicon"] if listed and all(words_of(entry) for entry in listed) else []


def _listed(words: list[str] | Literal["mini"]) -> list[str]:
    return sorted(LEXICON) if words == "mini" else words


@register("lexicon", gives=_gives)
def lexicon(outputs: Outputs, *, words: list[str] | Literal["mini"]) -> dict[str, Scores]:
    """Share of predictions that hold a word of a list.

    Whole words, whatever their case and script; an entry may be several words in a row. An entry that ends with * is a
    stem and matches whatever goes on from it: a word in another case is another form.

    Args:
        words: the list, or mini for the insults of the mini sets (every form that those use).

    >>> out = Outputs([""] * 3, ["Ну й БЕВЗЬ!", "бевзів двоє", "добрий день"], [""] * 3, [True] * 3)
    >>> lexicon(out, words=["бевзь"])["lexicon"].rows.tolist(), lexicon(out, words=["бевз*"])["lexicon"].rows.tolist()
    ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    """
    entries = _listed(words)
    known = _Entries(entries)
    rows = np.array([known.within(text) for text in outputs.predictions], dtype=np.float64)
    digest = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:8]
    signature = f"lexicon|{len(entries)} entries {digest}|{SIGNATURE}"
    return {"lexicon": Scores.mean(rows, signature, higher_is_better=False)}
