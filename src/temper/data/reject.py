"""Which answers of a teacher are not taken, each with a reason that is counted."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator

from pydantic import Field, field_validator, model_validator

from temper.data.clean import compiles, not_blank
from temper.recipe import Config

# Reasons, as they are counted. Those of `contains` and `matches` name what was found.
EMPTY, UNFINISHED, TOO_SHORT, TOO_LONG = "empty", "unfinished", "too short", "too long"
TOO_SIMILAR, LOST, TOO_MILD, REPEATED = "too similar", "names or numbers lost", "toxicity too low", "near duplicate"
STEM = 4  # letters of a name that its inflected forms share

_WORD = re.compile(r"[^\W\d_]+(?:[-'’ʼ][^\W\d_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_OPENING = " \t«„“\"'‘’([{—–-*"  # what may stand between a sentence's end and its first word
_ENDS = ".!?…:;\n"
_ALTERNATE = str.maketrans(dict.fromkeys("іїеєё", "о"))


class Reject(Config):
    """Which answers are rejected and asked for again."""

    empty: bool = Field(default=True, description="Blank answers.")
    unfinished: bool = Field(default=True, description="Answers cut by decoding.max_new_tokens.")
    contains: list[str] = Field(default=[], description="Answers that hold one of these, in capitals or small letters.")
    matches: list[str] = Field(default=[], description="Answers that match one of these regular expressions.")
    against: str | None = Field(
        default=None, description="Template of the text that length_ratio, too_similar and lost compare with."
    )
    length_ratio: tuple[float, float] | None = Field(
        default=None, description="Characters of the answer / characters of `against` must lie in [low, high]."
    )
    too_similar: float | None = Field(
        default=None, gt=0, le=1,
        description="Answers whose words agree with those of `against` to this share or more (1: the same words).",
    )  # fmt: skip
    lost: str | None = Field(
        default=None,
        description="Template of a text (a summary, say): its names and numbers that stand in `against` must stand in "
        "the answer too.",
    )
    toxicity_below: float | None = Field(
        default=None, gt=0, le=1, description="Answers that the classifier gives a lower probability; needs classifier."
    )

    _not_blank = field_validator("contains")(not_blank)
    _compiles = field_validator("matches")(compiles)

    @model_validator(mode="after")
    def _whole(self) -> Reject:
        asked = [n for n in ("length_ratio", "too_similar", "lost") if getattr(self, n) is not None]
        if asked and self.against is None:
            raise ValueError(f"{' and '.join(asked)} compare with a text: give `against` a template")
        if self.length_ratio and not 0 <= self.length_ratio[0] <= self.length_ratio[1]:
            raise ValueError(f"length_ratio {list(self.length_ratio)} must be [low, high] with 0 ≤ low ≤ high")
        return self


def reason(answer: str, ended: bool, rules: Reject, *, against: str = "", facts: str = "") -> str | None:
    """Why an answer is not taken, the first reason that fits; None: it is. The classifier's rule is the caller's.

    Args:
        ended: by the model, not by the limit.
        against: the text that it is compared with.
        facts: the text whose names and numbers must not be lost.
    """
    return next(_reasons(answer, ended, rules, against, facts), None)


def _reasons(answer: str, ended: bool, rules: Reject, against: str, facts: str) -> Iterator[str]:
    if rules.empty and not answer.strip():
        yield EMPTY
    if rules.unfinished and not ended:
        yield UNFINISHED
    small = _plain(answer)
    for part in rules.contains:
        if _plain(part) in small:
            yield f"contains «{part}»"
    for pattern in rules.matches:
        if re.search(pattern, answer):
            yield f"matches «{pattern}»"
    if rules.length_ratio is not None:
        low, high = rules.length_ratio
        if len(answer) < low * len(against):
            yield TOO_SHORT
        if len(answer) > high * len(against):
            yield TOO_LONG
    if rules.too_similar is not None and similarity(answer, against) >= rules.too_similar:
        yield TOO_SIMILAR
    if rules.lost is not None and lost(facts, against, answer):
        yield LOST


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def similarity(a: str, b: str) -> float:
    """Share of words that two texts have in common in the same order: 2·matching / (words of a + words of b).

    Ratcliff and Metzener, "Pattern matching: the Gestalt approach" (1988), over words. Two blank texts are equal.

    >>> similarity("The cat sat.", "the cat RAN")
    0.6666666666666666
    """
    words_a, words_b = (re.findall(r"\w+", _plain(text)) for text in (a, b))
    return difflib.SequenceMatcher(None, words_a, words_b, autojunk=False).ratio()


def lost(facts: str, source: str, answer: str) -> list[str]:
    """Names and numbers of `facts` that stand in `source` and not in `answer`, in order.

    Inflected forms are one name where they share their first 4 letters (names of four: three; shorter ones: all), the
    vowels that alternate in Slavic stems counting as one (Київ, Києва; Львів, Львова).

    >>> lost("Олена Бондар купила 3 книги.", "Учора Олена Бондар купила 3 книги.", "Якась Олено, 3 дурні книги!")
    ['Бондар']
    """
    in_source, in_answer = _forms(source), _forms(answer)
    gone = [n for n in names(facts) if _found(n, in_source) and not _found(n, in_answer)]
    numbers = [number.replace(",", ".") for number in _NUMBER.findall(facts)]
    there, said = ({n.replace(",", ".") for n in _NUMBER.findall(t)} for t in (source, answer))
    return list(dict.fromkeys(gone + [n for n in numbers if n in there and n not in said]))


def names(text: str) -> list[str]:
    """Capitalised words that do not begin a sentence, or that stand capitalised within one elsewhere in the text.

    A word after a full stop that closes a single letter (м. Київ, О. Бондар) begins no sentence.

    >>> names("Київ уранці. Новини з м. Львів: Київ росте. У Києві: Мер О. Бондар каже. Тут Київ.")
    ['Київ', 'Львів', 'Києві', 'О', 'Бондар']
    """
    found = [(m[0], _begins(text, m.start())) for m in _WORD.finditer(text) if m[0][0].isupper()]
    within = {word for word, begins in found if not begins}
    return list(dict.fromkeys(word for word, _ in found if word in within))


def _begins(text: str, start: int) -> bool:
    """Whether the word at `start` is the first of a sentence."""
    before = text[:start].rstrip(_OPENING)
    if not before or before[-1] not in _ENDS:
        return not before
    letter = before[-2:-1].isalpha() and not before[-3:-2].isalnum()
    return not (before[-1] == "." and letter)


def _forms(text: str) -> list[str]:
    return [word.casefold().translate(_ALTERNATE) for word in _WORD.findall(text)]


def _found(name: str, forms: list[str]) -> bool:
    stem = name.casefold().translate(_ALTERNATE)[: min(STEM, len(name) - 1) if len(name) > 3 else len(name)]
    return any(form.startswith(stem) for form in forms)


def advice(why: str) -> str:
    """What to change where this is the commonest reason."""
    known = {
        EMPTY: "check that the teacher is asked in the form it was trained in (teacher_format)",
        UNFINISHED: "raise decoding.max_new_tokens, ask for less, or take a teacher that knows when to stop",
        TOO_SHORT: "ask for longer answers, or widen reject.length_ratio",
        TOO_LONG: "ask for shorter answers, or widen reject.length_ratio",
        TOO_SIMILAR: "ask for more change, raise decoding.temperature, or raise reject.too_similar",
        LOST: "ask the teacher to keep names and numbers, or take a larger one",
        TOO_MILD: "ask for more, take a teacher that does not refuse, or lower reject.toxicity_below",
        REPEATED: "give more and more varied seeds, or raise decoding.temperature",
    }
    return known.get(
        why, "the teacher may be refusing: change the instruction, take another teacher, or change `reject`"
    )
