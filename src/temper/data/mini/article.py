"""From an event kind to an article: facts are drawn, a telling is put together, the people in it are named.

People are left open (`PERSON`, `NAME`) until the last step, so that one and the same article can be written clean or
with insults.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini import words
from temper.data.mini.draw import Draw, euphony, numbers
from temper.data.mini.kinds import COMMENTS, OPENERS, QUOTES, SAD_COMMENTS, SAD_QUOTES, SAYING, Kind
from temper.data.mini.kinds_city import CITY
from temper.data.mini.kinds_knowledge import KNOWLEDGE
from temper.data.mini.kinds_life import LIFE
from temper.data.mini.words import Person

KINDS = CITY + LIFE + KNOWLEDGE
PERSON, NAME = "\x01", "\x02"  # stand for «тренерка Олена Коваль» and «Коваль» until the article is written

Template = list[str | list[str]]


def _compile(template: str) -> Template:
    """«a [b|c] d» as ["a ", ["b", "c"], " d"]; brackets directly after «{x» or «{y» are indices, not choices."""
    parts: Template = []
    rest = template
    while rest:
        start = rest.find("[")
        while start > 0 and rest[start - 1] in "xy":
            start = rest.find("[", start + 1)
        if start < 0:
            break
        end = rest.index("]", start)
        while rest[end - 2] == "[":  # the index of a slot inside a choice
            end = rest.index("]", end + 1)
        parts += [rest[:start], rest[start + 1 : end].split("|")]
        rest = rest[end + 1 :]
    return [*parts, rest]


def _fill(template: Template, draw: Draw, slots: dict[str, object]) -> str:
    return "".join(part if isinstance(part, str) else draw.pick(part) for part in template).format_map(slots)


@dataclass(frozen=True)
class _Ready:
    """A kind with its templates compiled and its numbers listed."""

    kind: Kind
    tellings: list[list[Template]]
    asides: list[Template]


_READY = [
    _Ready(k, [[_compile(s) for s in telling] for telling in k.tellings], [_compile(s) for s in k.asides])
    for k in KINDS
]
_NUMBERS = {(k.n, k.genitive): numbers(*k.n, genitive=k.genitive) for k in KINDS}
_OTHER = numbers(5, 60, genitive=True)
_SAYING, _OPENERS = ([_compile(s) for s in pool] for pool in (SAYING, OPENERS))
_QUOTES = {sad: [_compile(s) for s in pool] for sad, pool in ((True, SAD_QUOTES), (False, QUOTES))}
_COMMENTS = {sad: [_compile(s) for s in pool] for sad, pool in ((True, SAD_COMMENTS), (False, COMMENTS))}


@dataclass(frozen=True)
class Article:
    """Sentences and summary with the person's places open."""

    sentences: list[str]
    summary: str
    title: str
    topic: str
    person: Person


def _facts(kind: Kind, draw: Draw, split: str | None) -> dict[str, object]:
    someone = words.person(draw, draw.pick(kind.roles), split)
    x, y = draw.pick(kind.x), draw.pick(kind.y)
    months = kind.months
    if x[-1] == "зима":  # the weather knows its season
        months, y = words.WINTER, ("морозу",)
    elif x[-1] == "літо":
        months, y = words.SUMMER, ("тепла",)
    n = draw.pick(_NUMBERS[kind.n, kind.genitive])
    other, third = (draw.pick([m for m in _OTHER if m != n]) for _ in range(2))
    female = someone.female
    return {
        "P": PERSON,
        "Q": NAME,
        "p": someone,
        "v": "ла" if female else "в",
        "a": "а" if female else "ий",
        "c": draw.pick(words.CITIES),
        "d": words.date(draw, months),
        "m": words.money(draw, kind.scale),
        "n": n,
        "o": other,
        "k": third,
        "x": x,
        "y": y,
    }


def _add_asides(sentences: list[str], ready: _Ready, draw: Draw, slots: dict[str, object]) -> None:
    """Two sentences that do not matter: two of background, quotation and comment, behind the first sentence."""
    left_out = draw.position(0, 2)
    if left_out != 0:
        sentences.insert(draw.position(1, len(sentences)), _fill(draw.pick(ready.asides), draw, slots))
    if left_out != 1:
        sentences.insert(draw.position(1, len(sentences)), _fill(draw.pick(_COMMENTS[ready.kind.sad]), draw, slots))
    if left_out != 2:  # somebody is quoted only after having been introduced
        slots["quote"] = _fill(draw.pick(_QUOTES[ready.kind.sad]), draw, slots)
        met = next(i for i, sentence in enumerate(sentences) if PERSON in sentence)
        sentences.insert(draw.position(met + 1, len(sentences)), _fill(draw.pick(_SAYING), draw, slots))


def article(draw: Draw, split: str | None) -> Article:
    """An article of five short sentences: three with the facts, two that do not matter."""
    ready = draw.pick(_READY)
    slots = _facts(ready.kind, draw, split)
    sentences = [_fill(template, draw, slots) for template in draw.pick(ready.tellings)]
    if draw.chance(0.4):
        sentences[1], sentences[2] = sentences[2], sentences[1]
    _add_asides(sentences, ready, draw, slots)
    if ":" not in sentences[0] and draw.chance(0.5):
        sentences[0] = _fill(draw.pick(_OPENERS), draw, slots) + sentences[0][0].lower() + sentences[0][1:]
    kind, someone = ready.kind, slots["p"]
    assert isinstance(someone, Person)
    summary, title = kind.summary.format_map(slots), kind.title.format_map(slots)
    return Article(sentences, summary, finish(title), kind.topic, someone)


def finish(sentence: str) -> str:
    """Sound rules and the capital at the beginning."""
    sentence = euphony(sentence)
    start = 1 if sentence.startswith("«") else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


def plain(sentence: str, person: Person) -> str:
    """A sentence with the person named and nothing else."""
    return finish(sentence.replace(PERSON, f"{person.role} {person.name}").replace(NAME, person.last))


def clean(news: Article) -> dict[str, str]:
    """The row `{text, summary, title, topic, before, named, after, person}` of an article as it is.

    text = before + named + after, cut at the first mention of its person; `named` has a capital where a sentence begins,
    `person` has none.
    """
    text, person = " ".join(plain(s, news.person) for s in news.sentences), f"{news.person.role} {news.person.name}"
    at = text.lower().index(person.lower())
    return {
        "text": text,
        "summary": plain(news.summary, news.person),
        "title": news.title,
        "topic": news.topic,
        "before": text[:at],
        "named": text[at : at + len(person)],
        "after": text[at + len(person) :],
        "person": person,
    }
