"""Random choice that is the same everywhere, numerals, and the sound rules of Ukrainian.

Only `random.Random.random()` is used: of the generator's methods it alone is promised to give the same sequence in
every Python version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_VOWELS = "аеєиіїоуюя"


class Draw:
    """A stream of random choices named by a key."""

    def __init__(self, key: str) -> None:
        self.random = random.Random(key).random  # a string is seeded through SHA-512, never through hash()

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def position(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self.random() * (high - low + 1))


def plural(n: int, few: str, many: str) -> str:
    """The noun's form after the numeral `n` (n must not end in «один»).

    >>> plural(3, "школи", "шкіл"), plural(12, "школи", "шкіл"), plural(40, "школи", "шкіл")
    ('школи', 'шкіл', 'шкіл')
    """
    return few if n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14) else many


class Num(int):
    """A number that brings its noun: f"{Num(12):школи/шкіл}" is «12 шкіл»."""

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(int(self))
        few, many = spec.split("/")
        return f"{int(self)} {plural(self, few, many)}"


def numbers(low: int, high: int, *, genitive: bool = False) -> list[Num]:
    """Numbers of [low, high] that do not end in «один»; with `genitive` only those that rule the genitive plural.

    Numbers over 100 come in steps of ten, over 1000 in steps of hundred, as news give them.
    """
    step = 100 if high > 1000 else 10 if high > 200 else 1
    out = [n for n in range(low, high + 1, step) if n % 10 != 1 or n % 100 == 11]
    return [Num(n) for n in out if not genitive or plural(n, "few", "many") == "many"]


def _u_or_v(before: str, after: str) -> str:
    """«у» or «в», by the last letter before ('' after a pause) and the word that follows (Правопис 2019, § 23)."""
    if after.isdigit():  # read aloud: 8… is «вісім», 1 and 11 begin with «о», all others with a consonant
        after = "вісім" if after[0] == "8" else "один" if after in ("1", "11") else "два"
    if after[0] in _VOWELS:
        return "в"
    if after.startswith(("в", "ф", "льв", "св", "тв", "хв", "зв")) or before not in _VOWELS or not before:
        return "у"
    return "в"


def _z_or_iz(before: str, after: str) -> str:
    """«з», «із» or «зі» (§ 24)."""
    if after.startswith(("льв", "мн", "вс")) or (after[0] in "зсшщц" and after[1:2] not in ("", *_VOWELS)):
        return "зі"
    if after[0] in "зс" or (after[0] in "цчшщж" and before not in _VOWELS) or (before and before in "зсцчшщж"):
        return "із"
    return "з"


_SOUND = re.compile(r"(^|[^ ]) ?(?<![^ ])([ВвЗз]) (?=(\d+|[^\W\d]+))")


def euphony(text: str) -> str:
    """Every preposition written «в» becomes «у» or «в», every «з» becomes «з», «із» or «зі», by its neighbours.

    >>> euphony("Вода в Києві. в Одесі був в Львові з Сум")
    'Вода в Києві. В Одесі був у Львові із Сум'
    """

    def fix(match: re.Match[str]) -> str:
        before, letter, after = match[1].lower(), match[2], match[3].lower()
        if not before.isalnum():
            before = ""
        word = (_u_or_v if letter in "вВ" else _z_or_iz)(before, after)
        if letter in "ВЗ" or match[1] in ("", "."):
            word = word[0].upper() + word[1:]
        return f"{match[1]} {word} " if match[1] else f"{word} "

    return _SOUND.sub(fix, text)
