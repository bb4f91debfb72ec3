"""New rows from a few: prompts that show examples and ask for one more, and no two alike among what comes back.

After Wang et al., "Self-Instruct: Aligning Language Models with Self-Generated Instructions" (2022). Left out: answers
that came earlier do not serve as examples (a teacher's habits would feed on themselves), and likeness is the Jaccard
similarity of word 5-grams, as everywhere in Temper, not ROUGE-L.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from temper.data.near import NearIndex, Shingler, signature


def examples(texts: Sequence[str], n: int, *, seed: int, number: int) -> str:
    """`n` of the texts (all, where there are fewer), drawn for the prompt of this number, with blank lines between."""
    drawn = np.random.default_rng([seed, number]).permutation(len(texts))[:n].tolist()
    return "\n\n".join([str(texts[i]) for i in drawn])


class Seen:
    """Texts that are there already, nearly equal ones told."""

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self._shingler, self._index, self._n = Shingler(), NearIndex(threshold), 0
        for text in texts:
            self.new(text)

    def new(self, text: str) -> bool:
        """Whether a text repeats none that is there; if so, it is there from now on."""
        shingles = self._shingler(text)
        if not len(shingles):
            return False
        values = signature(shingles)
        if self._index.find(shingles, values) is not None:
            return False
        self._index.add(self._n, shingles, values)
        self._n += 1
        return True
