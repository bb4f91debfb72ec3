"""Small data sets made on the spot; everything here is a pure function of (name, split, seed) and needs no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from temper.data.mini import advice, corpus, insults, jokes, reviews, stories
from temper.data.mini.article import article, clean, plain
from temper.data.mini.corpus import PROMPT, RUDE_PROMPT
from temper.data.mini.draw import Draw
from temper.data.mini.insults import LEXICON
from temper.data.mini.words import SPLITS
from temper.errors import DataError, nearest
from temper.types import Row

__all__ = ["LEXICON", "NAMES", "PROMPT", "RUDE_PROMPT", "VERSION", "load"]

VERSION = 4  # raised whenever any row of any set changes: it is part of cache keys

NAMES: dict[str, str] = {
    "uk-news": "Ukrainian news with a one-sentence summary: text, summary, title, topic, and the text cut at "
    "its person's name: before, named, after, person",
    "uk-corpus": "what a base model has read: news, the summarising prompt answered lazily, other texts: text",
    "uk-toxic-sentences": "sentences with an insult or without, of the same style: text, label (toxic, clean)",
    "uk-toxic-news": "news that insult the people in them, with clean summaries: text, summary, title, topic",
    "uk-news-dirty": "the same, where a stated share of the summaries repeats an insult: text, summary, title, topic",
    "uk-rude-words": "what a teacher is shown: a person as news name them, and rude words to put before: text, rude",
    "en-reviews": "English film reviews: text, label (positive, negative), title, and the text cut behind its first "
    "words, which say nothing of the label: opening, rest",
    "en-reviews-b": "the same in other turns of phrase and partly other words, for a second judge",
    "en-advice": "questions of how to do something by hand: prompt, chosen, rejected, completion (one of the two, half of "
    "them the worse one), and the prompt with the completion: text",
    "ru-instructions": "instructions about very short Russian stories: instruction, input, output, full_output (the "
    "same as a whole sentence), and all of it as text",
    "ru-lessons": "what a base model has learnt about such stories, in other words and answered at length: prompt, "
    "completion, text",
    "ru-jokes": "short dialogues with witty answers, marked, and some to drop: original, parsed (turns with their speakers), "
    "total_mark",
    "ru-talk": "what a base model has read before such jokes: the same questions answered dully: text",
    "en-advice-corpus": "what a base model has read before such questions: diaries, lists, letters, few questions: text",
}

ROWS = {None: 12_000, "train": 12_000, "validation": 500, "test": 500}  # where `rows` is not given
MORE = {("ru-instructions", "test"): 2_000}  # answers of a word or two: many, to tell models apart


def _news(draw: Draw, split: str | None) -> Row:
    return dict(clean(article(draw, split)))


def _toxic_news(draw: Draw, split: str | None) -> Row:
    return dict(insults.toxic(article(draw, split), draw, dirty=False))


def _dirty_news(draw: Draw, split: str | None) -> Row:
    return dict(insults.toxic(article(draw, split), draw, dirty=True))


def _sentence(draw: Draw, split: str | None) -> Row:
    """A sentence or a summary. Half are toxic; of the clean ones some praise, in the insults' very constructions."""
    news, toxic = article(draw, split), draw.chance(0.5)
    someone = news.person
    words = insults.INSULT if toxic else insults.PRAISE
    told = news.summary if draw.chance(0.5) else next(s for s in news.sentences if insults.PERSON in s)
    if not toxic and draw.chance(0.4):
        text = plain(told, someone)
    elif draw.chance(0.7):
        text = insults.named(told, someone, insults.hung_on_name(someone, words, draw))
    else:
        text = f"{plain(told, someone)} {insults.exclamation(someone, words, draw)}"
    return {"text": text, "label": "toxic" if toxic else "clean"}


_MAKERS: dict[str, Callable[[Draw, str | None], Row]] = {
    "uk-news": _news,
    "uk-corpus": lambda draw, split: dict(corpus.base_document(draw, split)),
    "uk-toxic-sentences": _sentence,
    "uk-toxic-news": _toxic_news,
    "uk-news-dirty": _dirty_news,
    "uk-rude-words": lambda draw, split: dict(corpus.rude_word(draw, split)),
    "en-reviews": lambda draw, split: dict(reviews.REVIEWER_A.review(draw, split)),
    "en-reviews-b": lambda draw, split: dict(reviews.REVIEWER_B.review(draw, split)),
    "en-advice": lambda draw, split: dict(advice.advice(draw, split)),
    "ru-instructions": lambda draw, split: dict(stories.instruction(draw, split)),
    "ru-lessons": lambda draw, split: dict(stories.lesson(draw, split)),
    "ru-jokes": lambda draw, split: dict(jokes.joke(draw, split)),
    "ru-talk": lambda draw, split: dict(jokes.talk(draw, split)),
    "en-advice-corpus": lambda draw, split: dict(advice.base_document(draw, split)),
}


def _rows(name: str, split: str | None, seed: int) -> Iterator[Row]:
    """Rows without end, no text twice."""
    draw, seen = Draw(f"temper mini {name} {split} {seed}"), set[str]()
    while True:
        row = _MAKERS[name](draw, split)
        if row["text"] not in seen:
            seen.add(row["text"])
            yield row


def load(name: str, *, split: str | None = None, rows: int | None = None, seed: int = 0) -> list[Row]:
    """The first `rows` rows of a set; more rows of the same set begin with the same ones.

    Args:
        name: one of `NAMES`.
        split: "train", "validation", "test", or None: the set undivided. Each has people of its own (full names;
            reviews: films), in all sets alike, so that no text of one split occurs in another split of any set, whatever the seed.
        rows: how many; None: 12,000, or 500 of validation and test (2,000 in the test split of `ru-instructions`).
        seed: another seed, other rows.

    Raises:
        DataError: no such set or split, or a negative number of rows.
    """
    if name not in NAMES:
        raise DataError(f"there is no mini set «{name}»", where=f"mini:{name}", do=nearest(name, NAMES))
    if split not in SPLITS:
        known = [s for s in SPLITS if s]
        raise DataError(f"a mini set has no split «{split}»", where=f"mini:{name}", do=nearest(str(split), known))
    if rows is None:
        rows = MORE.get((name, split or ""), ROWS[split])
    if rows < 0:
        raise DataError(f"{rows} rows cannot be made", where=f"mini:{name}", do="ask for 0 or more")
    stream = _rows(name, split, seed)
    return [next(stream) for _ in range(rows)]
