"""Very short Russian stories, with instructions about them and short answers; and what a base has learnt before.

A sentence says who did what, when and where; another says something beside. An instruction asks for one of the four, or for
the sentence without the time; `output` is the answer, `full_output` the whole sentence. What a base has learnt has
other wordings, and answers mostly at length.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.draw import Draw
from temper.data.mini.grammar import fill, sentence
from temper.data.mini.words import SPLITS

# Nominative; those that end in a vowel are women's.
NAMES = [
    "Анна", "Борис", "Вера", "Глеб", "Дарья", "Егор", "Жанна", "Захар", "Инна", "Кирилл",
    "Лариса", "Максим", "Нина", "Олег", "Полина", "Роман", "Софья", "Тимур", "Ульяна", "Фёдор",
    "Юлия", "Яков", "Марина", "Павел", "Ольга", "Степан", "Тамара", "Игорь", "Елена", "Виктор",
]  # fmt: skip


@dataclass(frozen=True)
class Action:
    """A verb in the past tense, of men and of women; things in the accusative; places with their preposition."""

    men: str
    women: str
    things: tuple[str, ...]
    places: tuple[str, ...]


def _action(verbs: str, things: str, places: str) -> Action:
    men, women = verbs.split("/")
    return Action(men, women, tuple(things.split(", ")), tuple(places.split(", ")))


ACTIONS = (
    _action("купил/купила", "хлеб, молоко, сыр, чай, мёд, муку, соль, перец", "в магазине, на рынке, в киоске, в порту"),
    _action("чинил/чинила", "велосипед, часы, крышу, забор, кран, лодку, стул, замок", "во дворе, в гараже, в подвале, на даче"),
    _action("читал/читала", "журнал, письмо, роман, сказку, газету, стихи, книгу, дневник", "в парке, в поезде, на балконе, в библиотеке"),
    _action("рисовал/рисовала", "море, портрет, горы, цветы, мост, башню, облака, реку", "в студии, на берегу, в школе, на холме"),
    _action("нашёл/нашла", "ключ, кошелёк, монету, зонт, перчатку, карту, кольцо, шарф", "в лесу, на улице, в автобусе, под мостом"),
    _action("варил/варила", "суп, кашу, варенье, кофе, борщ, компот, картошку, рис", "на кухне, у костра, в столовой, в палатке"),
    _action("посадил/посадила", "дуб, розы, лук, тыкву, сирень, яблоню, ёлку, морковь", "в саду, на клумбе, у дома, за забором"),
    _action("спрятал/спрятала", "подарок, фонарь, конверт, сундук, билет, альбом, мяч, деньги", "в шкафу, под кроватью, на чердаке, за дверью"),
)  # fmt: skip
TIMES = [
    "утром", "днём", "вечером", "ночью", "вчера", "весной",
    "летом", "осенью", "зимой", "в субботу", "в среду", "в полдень",
]  # fmt: skip

ASIDES = (
    "Шёл дождь.", "Было тепло.", "Дул ветер.", "Светило солнце.", "Пели птицы.", "Было тихо.",
    "Играла музыка.", "Пахло мятой.", "Лаяла собака.", "Гудел мотор.", "Стоял туман.", "Падал снег.",
)  # fmt: skip
ORDERS = (  # of a sentence
    "{time} {name} {verb} {place} {thing}",
    "{name} {time} {verb} {thing} {place}",
    "{place} {name} {verb} {thing} {time}",
    "{time} {place} {name} {verb} {thing}",
)


@dataclass(frozen=True)
class Fact:
    """Who did what, when and where."""

    name: str
    action: Action
    thing: str
    time: str
    place: str
    order: str

    @property
    def slots(self) -> dict[str, str]:
        verb = self.action.women if self.name[-1] in "ая" else self.action.men
        return {
            "name": self.name, "verb": verb, "men": self.action.men, "thing": self.thing, "time": self.time,
            "place": self.place,
        }  # fmt: skip

    @property
    def sentence(self) -> str:
        return sentence(self.order.format(**self.slots))


def fact(draw: Draw, split: str | None) -> Fact:
    """Pairs of a name and a thing are dealt out to the splits."""
    action = draw.pick(ACTIONS)
    thing, name = draw.position(0, len(action.things) - 1), draw.position(0, len(NAMES) - 1)
    while (thing + 3 * name) % 10 not in SPLITS[split]:
        name = (name + 1) % len(NAMES)
    return Fact(
        NAMES[name], action, action.things[thing], draw.pick(TIMES), draw.pick(action.places), draw.pick(ORDERS)
    )


def story(told: Fact, draw: Draw) -> str:
    """The fact and a sentence beside it that answers none of the questions, in either order."""
    sentences = [told.sentence, draw.pick(ASIDES)]
    return " ".join(sentences if draw.chance(0.5) else reversed(sentences))


# What is asked → its wordings and the slot that answers.
ASKED = {
    "name": ("Кто {men} {thing}?", "Назови того, кто {men} {thing}.", "Ответь одним словом: кто {men} {thing}?"),
    "thing": ("Что {verb} {name}?", "Скажи, что {verb} {name}.", "Коротко назови вещь, которую {verb} {name}."),
    "place": ("Где {name} {verb} {thing}?", "Укажи, где {name} {verb} {thing}.", "Коротко назови место, где был{a} {name}."),
    "time": ("Когда {name} {verb} {thing}?", "Укажи, когда {name} {verb} {thing}.", "Назови время, когда {name} {verb} {thing}."),
}  # fmt: skip
SHORTER = ("Перескажи без времени.", "Сократи: кто, что и где делал.", "Сожми рассказ.")
SHORTER_SHARE = 0.2


def instruction(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{instruction, input, output, full_output, text}`."""
    told = fact(draw, split)
    given, slots = story(told, draw), told.slots
    if draw.chance(SHORTER_SHARE):
        asked, short = draw.pick(SHORTER), "{name} {verb} {thing} {place}".format(**slots)
    else:
        slot = draw.pick(list(ASKED))
        slots["a"] = "а" if slots["verb"] == told.action.women else ""
        asked, short = draw.pick(ASKED[slot]).format(**slots), slots[slot]
    return {
        "instruction": asked, "input": given, "output": short, "full_output": told.sentence,
        "text": f"{asked}\n{given}\n{short}",
    }  # fmt: skip


# Of the base: the same needs in other words, answered by whole sentences of the story, or by the whole story.
LESSONS = (
    "[расскажи|напиши|вспомни] про [имя|человека]: {name}",
    "[расскажи|напиши|вспомни] про [вещь|предмет]: {thing}",
    "[расскажи|напиши|вспомни] про место: {place}",
    "[расскажи|напиши|вспомни] про время: {time}",
)
REPEATED = "[повтори|перепиши] [рассказ|текст]"
BRIEF = {  # and now and then by a word or two
    "name": "кратко, имя: {thing}",
    "thing": "кратко, вещь: {name}",
    "place": "кратко, место: {name}",
    "time": "кратко, время: {name}",
}
BRIEF_SHARE, REPEATED_SHARE = 0.45, 0.1


def lesson(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{prompt, completion, text}` of what the base learns; the text is all of it."""
    about = fact(draw, split)
    given, sort = story(about, draw), draw.random()
    if sort < BRIEF_SHARE:
        slot = draw.pick(list(BRIEF))
        asked, answer = BRIEF[slot].format(**about.slots), about.slots[slot]
    elif sort < BRIEF_SHARE + REPEATED_SHARE:
        asked, answer = fill(REPEATED, draw, {}), given
    else:
        asked, answer = fill(draw.pick(LESSONS), draw, {}, about.slots), about.sentence
    return {"prompt": f"{asked}\n{given}", "completion": answer, "text": f"{asked}\n{given}\n{answer}"}
