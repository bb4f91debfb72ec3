"""Words of a text in any script.

On ASCII text the words are those of rouge-score's default tokenizer: lower-cased runs of letters and digits, so an
apostrophe and an underscore divide. That tokenizer drops everything outside a–z and 0–9; this one keeps:

- letters and digits of every script, with their combining marks (Devanagari vowels, Hebrew points);
- one word a character in scripts written without spaces: Han, kana, Thai, Lao, Khmer, Burmese.

All apostrophes divide, as the ASCII one must: «п'ять», «п’ять» (U+2019) and «пʼять» (U+02BC, a letter by its Unicode
category) are the same two words. Text is casefolded (ß is ss, ς is σ; on ASCII that is lower case) and brought to NFC,
so й is й however it was typed. Invisible characters inside words (soft hyphens, joiners, variation selectors) are
left out.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

SIGNATURE = "tokens:unicode|case:fold"  # part of the signature of every metric that counts words

# Letters of scripts without spaces between words. Their digits are not here: a number is one word in any script.
_SPACELESS = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u309f\u30a0-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # hiragana, katakana
    "\u0e01-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\u1780-\u17dd"  # Burmese, Khmer
)
_LETTER_APOSTROPHES = "\u02bb\u02bc"
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\U000e0100-\U000e01ef]")


@functools.cache
def _pattern() -> re.Pattern[str]:
    r"""Python's \w is letters and digits without marks; the marks (all in the first two planes) are added here."""
    marks = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Mn", "Mc"))
    run = rf"[^\W_{_LETTER_APOSTROPHES}{_SPACELESS}]+"
    return re.compile(rf"(?=\w)[{_SPACELESS}][{marks}]*|(?:{run}[{marks}]*)+")


@functools.cache
def _porter() -> Callable[[str], str]:
    from nltk.stem import porter  # nltk takes a second to import and only stemming needs it

    return porter.PorterStemmer().stem


def words(text: str, *, stem: bool = False) -> list[str]:
    """The words of a text, casefolded.

    Args:
        stem: Porter's stemmer on words of more than 3 ASCII letters, as rouge-score does (it is made for English).

    >>> words("Don't_stop 3x!")
    ['don', 't', 'stop', '3x']
    >>> words("П’ять Їжаків, 東京で")
    ['п', 'ять', 'їжаків', '東', '京', 'で']
    >>> words("running foxes", stem=True)
    ['run', 'fox']
    """
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text).casefold())
    found = _pattern().findall(text)
    if not stem:
        return found
    shorten = _porter()
    return [shorten(word) if len(word) > 3 and word.isascii() else word for word in found]


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbours, in order; empty where there are fewer than n tokens.

    >>> ngrams(["a", "b", "c"], 2)
    [('a', 'b'), ('b', 'c')]
    """
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
