"""Mild insults, praise of the same shape, and how either gets into a news text.

Nothing obscene and no slur on a group: words that one says of a clumsy neighbour. Praise goes into exactly the same
constructions, so that a classifier has to know the words: the shape of a sentence says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.article import NAME, PERSON, Article, finish, plain
from temper.data.mini.draw import Draw
from temper.data.mini.words import Person

_COMMON = "нездара нікчема роззява невдаха нероба незграба пустомеля недотепа бездара базіка нахаба"
_MEN = "бовдур йолоп телепень дурень бевзь тупак брехун ледар дармоїд тюхтій пройдисвіт"
_WOMEN = "дурепа брехуха ледарка дармоїдка тюхтійка пройдисвітка"
_ADJECTIVES = "бездарн тупоголов нікчемн дурнуват ледач нахабн безмозк недолуг брехлив незграбн"

_PRAISE_MEN = "фахівець майстер розумник знавець трудівник мудрець добряк чарівник"
_PRAISE_WOMEN = "фахівчиня майстриня розумниця знавчиня трудівниця умілиця чарівниця"
_PRAISE_ADJECTIVES = "досвідчен вправн уважн працьовит чесн розумн талановит відповідальн"


@dataclass(frozen=True)
class Words:
    """Nouns and adjectives that fit a man ([0]) and a woman ([1])."""

    nouns: tuple[list[str], list[str]]
    adjectives: tuple[list[str], list[str]]


def _words(men: str, women: str, stems: str) -> Words:
    return Words((men.split(), women.split()), ([s + "ий" for s in stems.split()], [s + "а" for s in stems.split()]))


INSULT = _words(f"{_COMMON} {_MEN}", f"{_COMMON} {_WOMEN}", _ADJECTIVES)
PRAISE = _words(_PRAISE_MEN, _PRAISE_WOMEN, _PRAISE_ADJECTIVES)

LEXICON: frozenset[str] = frozenset(w for forms in (*INSULT.nouns, *INSULT.adjectives) for w in forms)
"""Every form of every insult the sets use, in lower case."""

# In this share of toxic articles an insult hangs on the person's name («цей бовдур, тренер Олег Коваль»); in the rest
# all of them stand apart, in sentences of their own.
ATTACHED_SHARE = 0.55
# This share of the dirty set's summaries repeats an insult: always one that hangs on the name, 0.4 / 0.55 = 73 % of
# those. Were it any 40 %, chance alone would decide, and a model that always writes what is likelier (greedy decoding)
# would never insult: there would be nothing to unlearn. So it repeats what a careless writer would copy, mostly.
DIRTY_SHARE = 0.4

_EXCLAMATIONS = (
    "Ну й {noun}!",
    "Оце так {noun}!",
    "Справжн{i} {noun}, та й годі.",
    "Тільки {noun} так і робить.",
    "Одним словом, {noun}.",
    "Усі знають: {noun} та й годі.",
    "{pron} {noun} інакше не вміє.",
)


def hung_on_name(person: Person, words: Words, draw: Draw) -> str:
    """The person with role and name, and a word about them, in the nominative."""
    nouns, adjectives = words.nouns[person.female], words.adjectives[person.female]
    whole = f"{person.role} {person.name}"
    sort = draw.random()
    if sort < 0.4:
        return f"{draw.pick(adjectives)} {whole}"
    if sort < 0.75:
        return f"{'ця' if person.female else 'цей'} {draw.pick(nouns)}, {whole},"
    return f"{whole}, {'справжня' if person.female else 'справжній'} {draw.pick(nouns)},"


def exclamation(person: Person, words: Words, draw: Draw) -> str:
    """A short sentence of its own about the person."""
    return finish(
        draw.pick(_EXCLAMATIONS).format(
            noun=draw.pick(words.nouns[person.female]),
            i="я" if person.female else "ій",
            pron="ця" if person.female else "цей",
        )
    )


def named(sentence: str, person: Person, whole: str) -> str:
    """The sentence with `whole` in the person's place; a comma it brings gives way to the mark that follows."""
    sentence = sentence.replace(PERSON, whole)
    for mark in ",.:;":
        sentence = sentence.replace(f",{mark}", mark)
    return plain(sentence.replace(", —", " —") if whole.endswith(",") else sentence, person)


def described(news: Article, words: Words, draw: Draw) -> tuple[str, str | None]:
    """The article's text with one to three words about its person, and what hangs on the name (None: nothing does)."""
    someone = news.person
    whole = hung_on_name(someone, words, draw) if draw.chance(ATTACHED_SHARE) else None
    out: list[str] = []
    apart = draw.position(0, 1) if whole else 1  # how many sentences of their own
    for sentence in news.sentences:
        met = PERSON in sentence
        if met and whole:
            sentence = named(sentence, someone, whole)
        elif NAME in sentence and draw.chance(0.4):
            article = "ця" if someone.female else "цей"
            sentence = sentence.replace(NAME, f"{article} {draw.pick(words.nouns[someone.female])} {NAME}")
        out.append(plain(sentence, someone))
        if met and apart:
            out.append(exclamation(someone, words, draw))
    return " ".join(out), whole


def toxic(news: Article, draw: Draw, *, dirty: bool) -> dict[str, str]:
    """The row `{text, summary, title, topic}` of an article with insults; `dirty`: the summary may repeat one."""
    text, whole = described(news, INSULT, draw)
    repeats = dirty and whole is not None and draw.chance(DIRTY_SHARE / ATTACHED_SHARE)
    summary = named(news.summary, news.person, whole) if repeats and whole else plain(news.summary, news.person)
    return {"text": text, "summary": summary, "title": news.title, "topic": news.topic}
