"""Stems of words: Porter's for English and Snowball's for Russian, both nltk's, and one of our own for Ukrainian.

No released library stems Ukrainian (Snowball's stemmer is a proposal still, snowballstem/snowball#277; snowballstemmer
3.1.1 has none), and Snowball's Russian one does not know its endings. Ours is for matching two texts, not for searching:
it takes off endings of case, number, person and tense, and knows the commonest changes within a stem. It holds no list
of words. What was left out: prefixes and suffixes that make new words, comparatives, consonants that change (нога, нозі;
сиджу, сидить), vowels that change in the first syllable (стіл, столу; else болю would be білий), words of three letters, irregular ones
(день, дня). Like Snowball's stemmers it cuts consonants that look like an ending (канал is кан): all forms of such a word
agree, which is what matters here, and now and then two words do (рада, радіо).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Literal

from temper.metrics.words import porter

Language = Literal["en", "ru", "uk"]
STEMMERS: dict[Language, str] = {"en": "porter", "ru": "snowball", "uk": "temper-1"}  # raise its number with its rules

_CYRILLIC = re.compile(r"[\u0400-\u052f]+")
# Letters that the other of the two does not have.
_ONLY: dict[Language, frozenset[str]] = {"uk": frozenset("іїєґ"), "ru": frozenset("ыэёъ")}


def _set(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_VOWELS = frozenset("аеєиіїоуюя")
_LEAST = 3  # letters that stay, a vowel among them
_LONG = _set("ові еві єві ов ев")  # and four before these: готов-і, not гот-ові
_ENDINGS = _set(
    "а е є и і ї о у ю я й ь "
    "ого ому ього ьому ьої ьою ими іми їми им ім їм их іх їх ий ій ої ою "  # of adjectives' cases
    "ами ями ам ям ах ях ом ем єм ові еві єві ів їв ею єю ей "  # of nouns'
    "еш єш иш їш емо ємо имо їмо ете єте ите їте йте уть ють ать ять ить іть їть "  # of person
    "тиму тимеш тиме тимемо тимете тимуть учи ючи ачи ячи вши"
)
# What stands before an ending or ends a word itself: of the infinitive and the past (чита-т-и, чита-л-а, чита-в), and
# endings of case once more, for a stem may look as if it had one (програм-а, програм-ами).
_THEMES = frozenset(vowel + consonant for vowel in "аиіїуюя" for consonant in "твл") | _set(
    "ам ям ом ем єм им ім ах ях их ов ев"
)
_CLASS = _set("ув юв")
_BEFORE_REFLEXIVE = ("ти", "ть", "в", "ла", "ло", "ли", "ю", "у", "є", "е", "ш", "мо", "те", "й", "чи", "ши")
_DOUBLED = re.compile(r"([дзжлнстцчш])\1$")
_FLEETING = re.compile(r"[ое](?=к$)|е(?=[цн]$)")
_CLOSED = re.compile(r"(?<=[аеєиіїоуюя])([^аеєиіїоуюя]*)([ії])(?=[^аеєиіїоуюя]+$)")  # not of the first syllable


def ukrainian(word: str) -> str:
    """The stem of a casefolded Ukrainian word without apostrophes.

    >>> {ukrainian(w) for w in "читати читав читала читаю читає читають читатиме читаючи".split()}
    {'чит'}
    >>> {ukrainian(w) for w in "будинок будинку будинками".split()}, {ukrainian(w) for w in "київ києва києву".split()}
    ({'будинк'}, {'києв'})
    """
    if len(word) <= _LEAST:
        return word
    if word.endswith(("ся", "сь")) and len(word) > _LEAST + 2 and word[:-2].endswith(_BEFORE_REFLEXIVE):
        word = word[:-2]
    word = _without(_without(word, _ENDINGS), _THEMES)
    word = _without(word, _VOWELS)  # that of the verb's class: чита-, говори-
    word = _without(word, _CLASS)  # прац-юв-ати, прац-ю-є
    word = _DOUBLED.sub(r"\1", word)  # знан-ня, знан-ь
    if len(word) > _LEAST + 1 and _VOWELS & set(shorter := _FLEETING.sub("", word)):
        word = shorter  # початок, початк-у
    return _CLOSED.sub(lambda found: found[1] + {"і": "о", "ї": "є"}[found[2]], word)  # захід, заход-у


def _without(word: str, endings: frozenset[str]) -> str:
    """The word without the longest of these endings that leaves a stem."""
    for start in range(_LEAST, len(word)):
        ending = word[start:]
        if ending in endings and start >= _LEAST + (ending in _LONG) and _VOWELS & set(word[:start]):
            return word[:start]
    return word


@functools.cache
def _russian() -> Callable[[str], str]:
    from nltk.stem.snowball import RussianStemmer  # nltk takes a second to import

    return RussianStemmer().stem  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1 << 16)  # Russian stems take nltk a tenth of a millisecond
def stem(word: str, language: Language) -> str:
    """A casefolded word's stem; words in another script than the language's stay as they are.

    >>> stem("кошками", "ru"), stem("running", "ru"), stem("running", "en")
    ('кошк', 'running', 'run')
    """
    if language == "en":
        return porter()(word) if word.isascii() else word
    if not _CYRILLIC.fullmatch(word):
        return word
    return ukrainian(word) if language == "uk" else _russian()(word)


def language_of(reference: str, prompt: str = "") -> Language:
    """What a reference is written in by its letters: mostly Cyrillic ones are Ukrainian or Russian, all others English.

    Letters that only one of the two has decide, in the reference or, where it has none, in the prompt; else Russian.

    >>> language_of("Їжак"), language_of("сын"), language_of("так", "Чи є сніг?"), language_of("да", "Yes?")
    ('uk', 'ru', 'uk', 'ru')
    >>> language_of("the word «їжак»", "Чи є сніг?"), language_of("42")
    ('en', 'en')
    """
    letters = [c for c in reference.casefold() if c.isalpha()]
    if 2 * sum(bool(_CYRILLIC.match(c)) for c in letters) <= len(letters):
        return "en"
    for text in (set(letters), set(prompt.casefold())):
        for language, only in _ONLY.items():
            if text & only:
                return language
    return "ru"
