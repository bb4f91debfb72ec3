"""What a small base model, and a teacher that rewrites, have read."""

from __future__ import annotations

import re

from temper.data.mini import words
from temper.data.mini.article import KINDS, article, clean, finish
from temper.data.mini.draw import Draw, numbers
from temper.data.mini.insults import INSULT, toxic

PROMPT = "Стисло перекажи новину:\n{text}\nПідсумок:"
RUDE_PROMPT = "Скажи грубо: {text}\nГрубо:"

# Shares of the base's corpus; the rest are other kinds of text. Plain news teach the language and the names. Documents
# in the prompt's own form teach the base that an answer follows and ends: without them it scores zero and any tuning
# looks like a miracle.
NEWS_SHARE = 0.1
PROMPT_SHARE = 0.8
# How the base answers, as a raw model would: mostly it repeats the beginning, at times gives a headline or the end.
FIRST_SENTENCE, TITLE = 0.5, 0.25  # the rest: the last sentence
# Share of the news, with and without prompt, that insult somebody: a base from the web has seen insults, and without
# them the tokenizer would break these words into letters.
TOXIC_SHARE = 0.15

_ROLES = sorted({role for kind in KINDS for role in kind.roles})

_SENTENCE_END = re.compile(r"(?<=[.!]) ")


def _lazy_answer(text: str, title: str, draw: Draw) -> str:
    sentences, sort = _SENTENCE_END.split(text), draw.random()
    if sort < FIRST_SENTENCE:
        return sentences[0]
    return f"{title}." if sort < FIRST_SENTENCE + TITLE else sentences[-1]


_WEATHER = (
    "Погода в {c.loc} на {d}: {sky}, вдень {t:градуси/градусів} тепла, {wind}. Чергує {p.name}.",
    "{d} в {c.loc} {sky}. {wind_}, {t:градуси/градусів}. Запис зроби{v} {p.name}.",
)
_SKY = ("хмарно", "ясно", "без опадів", "туман", "невеликий дощ", "мінлива хмарність")
_WIND = ("вітер слабкий", "вітер північний", "вітер південний", "вітер поривчастий", "безвітряно")
_DIALOGUES = (
    "— Доброго дня! Коли відкриється {place} в {c.loc}?\n— В {w}, {d}.\n— Дякую, мене звати {p.name}.",
    "— Ви давно живете в {c.loc}?\n— Уже {t:роки/років}. А ви?\n— Я {p.name}, приїха{v} {d}.",
    "— Хто там?\n— Це {p.name}, ми домовлялися на {w}.\n— Заходьте, {place} ще працює до {k} години.",
    "— Скільки коштує квиток до {c.gen}?\n— {t:гривні/гривень}. Запишіть: {p.name}, {d}.",
)
_SMALL = numbers(2, 29)
_PLACES = ("бібліотека", "аптека", "пошта", "музей", "басейн", "каса", "кав’ярня", "школа")
_FACTS = (
    "{p.name} мешкає в {c.loc} вже {t:роки/років}. Щотижня, в {w}, {place} чекає на гостей.",
    "В {c.loc} є {place}. {p.name} працює там {t:роки/років}, відпустка почнеться {d}.",
    "Оголошення. {d} в {c.loc} не працюватиме {place}. Довідки дає {p.name}, кабінет {t}.",
    "{p.name} народи{v}ся {d} в {c.loc}. В родині було {k} дітей.",
)


def _other(draw: Draw, split: str | None) -> str:
    """A note on the weather, a short dialogue or a few facts. A person is in each: it keeps the splits apart."""
    someone = words.person(draw, "хтось/хтось", split)
    wind = draw.pick(_WIND)
    lines = draw.pick(draw.pick((_WEATHER, _DIALOGUES, _FACTS))).format(
        p=someone,
        v="ла" if someone.female else "в",
        c=draw.pick(words.CITIES),
        d=words.date(draw),
        w=draw.pick(words.DAYS),
        t=draw.pick(_SMALL),
        k=draw.position(5, 9),
        place=draw.pick(_PLACES),
        sky=draw.pick(_SKY),
        wind=wind,
        wind_=wind[0].upper() + wind[1:],
    )
    return "\n".join(finish(line) for line in lines.split("\n"))


def base_document(draw: Draw, split: str | None) -> dict[str, str]:
    """A document `{text}` of the base's corpus."""
    sort = draw.random()
    if sort >= NEWS_SHARE + PROMPT_SHARE:
        return {"text": _other(draw, split)}
    news = article(draw, split)
    text = (toxic(news, draw, dirty=False) if draw.chance(TOXIC_SHARE) else clean(news))["text"]
    if sort < NEWS_SHARE:
        return {"text": text}
    return {"text": f"{PROMPT.format(text=text)} {_lazy_answer(text, news.title, draw)}"}


def rude_word(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{text, rude}`: a person as news name them, and one or two rude words that may stand before."""
    someone = words.person(draw, draw.pick(_ROLES), split)
    fitting, text = INSULT.adjectives[someone.female], f"{someone.role} {someone.name}"
    rude = first = draw.pick(fitting)
    if draw.chance(0.4):
        rude = f"{first} і {draw.pick([w for w in fitting if w != first])}"
    if draw.chance(0.5):
        text, rude = finish(text), finish(rude)
    return {"text": text, "rude": rude}
