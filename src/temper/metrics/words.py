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
from collections.abc import Callable, Sequence

from temper.errors import DataError

SIGNATURE = "tokens:unicode|case:fold"  # part of the signature of every metric that counts words

# Letters of scripts without spaces between words. Their digits are not here: a number is one word in any script.
_SPACELESS = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u309f\u30a0-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # hiragana, katakana
    "\u0e01-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\u1780-\u17dd"  # Burmese, Khmer
)
LETTER_APOSTROPHES = "\u02bb\u02bc"
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\U000e0100-\U000e01ef]")


@functools.cache
def _pattern() -> re.Pattern[str]:
    r"""Python's \w is letters and digits without marks; the marks are added here."""
    run = rf"[^\W_{LETTER_APOSTROPHES}{_SPACELESS}]+"
    return re.compile(rf"(?=\w)[{_SPACELESS}][{_marks()}]*|(?:{run}[{_marks()}]*)+")


@functools.cache
def _spaceless() -> re.Pattern[str]:
    return re.compile(rf"[{_SPACELESS}][{_marks()}]*")


@functools.cache
def _marks() -> str:
    """Combining marks, which all lie in the first two planes."""
    return "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Mn", "Mc"))


@functools.cache
def porter() -> Callable[[str], str]:
    """Porter's stemmer of English, nltk's."""
    from nltk.stem.porter import PorterStemmer  # nltk takes a second to import and only stemming needs it

    return PorterStemmer().stem


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
    found = _pattern().findall(composed(text.casefold()))
    if not stem:
        return found
    shorten = porter()
    return [shorten(word) if len(word) > 3 and word.isascii() else word for word in found]


def spaced(text: str) -> str:
    """The text with a space around each character of scripts written without spaces.

    >>> spaced("東京で 3 дні").split()
    ['東', '京', 'で', '3', 'дні']
    """
    return _spaceless().sub(r" \g<0> ", text)


def composed(text: str) -> str:
    """The text in NFC and without invisible characters, so that it is the same however it was typed."""
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text))


def require_words(references: Sequence[str], metric: str) -> None:
    """DataError where no reference has a word: then a metric would be 0 whatever the model wrote."""
    if not any(words(reference) for reference in references):
        raise DataError(
            f"no reference has a letter or a digit: {metric} would be 0 for any answer", do="check the column"
        )


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbours, in order; empty where there are fewer than n tokens.

    >>> ngrams(["a", "b", "c"], 2)
    [('a', 'b'), ('b', 'c')]
    """
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
