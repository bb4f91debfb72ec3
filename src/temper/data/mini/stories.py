"""Russian stories of two people, with instructions about them and short answers; and what a base has learnt before.

Every sentence says who did what, when and where. An instruction asks for one of these, for everybody's name, or for the
story without times and places; `output` is the answer, `full_output` the same in a whole sentence of the story. What a base
has learnt has other wordings, and answers at length.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.draw import Draw
from temper.data.mini.grammar import fill, sentence
from temper.data.mini.words import SPLITS

# Nominative; those that end in a vowel are women's.
NAMES = [
    "Анна",
    "Борис",
    "Вера",
    "Глеб",
    "Дарья",
    "Егор",
    "Жанна",
    "Захар",
    "Инна",
    "Кирилл",
    "Лариса",
    "Максим",
    "Нина",
    "Олег",
    "Полина",
    "Роман",
    "Софья",
    "Тимур",
    "Ульяна",
    "Фёдор",
    "Юлия",
    "Яков",
    "Марина",
    "Павел",
    "Ольга",
    "Степан",
    "Тамара",
    "Игорь",
    "Елена",
    "Виктор",
]


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
    "утром",
    "днём",
    "вечером",
    "ночью",
    "вчера",
    "весной",
    "летом",
    "осенью",
    "зимой",
    "в субботу",
    "в среду",
    "в полдень",
]

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


def facts(draw: Draw, split: str | None) -> list[Fact]:
    """Two, nothing in common between them. Pairs of a name and a thing are dealt out to the splits."""
    out: list[Fact] = []
    while len(out) < 2:
        action = draw.pick([a for a in ACTIONS if all(a is not f.action for f in out)])
        thing, name = draw.position(0, len(action.things) - 1), draw.position(0, len(NAMES) - 1)
        while (thing + 3 * name) % 10 not in SPLITS[split] or any(NAMES[name] == f.name for f in out):
            name = (name + 1) % len(NAMES)
        time = draw.pick([t for t in TIMES if all(t != f.time for f in out)])
        place = draw.pick(action.places)
        out.append(Fact(NAMES[name], action, action.things[thing], time, place, draw.pick(ORDERS)))
    return out


# What is asked → its wordings and the slot that answers.
ASKED = {
    "name": ("Кто {men} {thing}?", "Назови того, кто {men} {thing}.", "Ответь одним словом: кто {men} {thing}?"),
    "thing": ("Что {verb} {name}?", "Скажи, что {verb} {name}.", "Коротко назови вещь, которую {verb} {name}."),
    "place": ("Где {name} {verb} {thing}?", "Укажи, где {name} {verb} {thing}.", "Коротко назови место, где был{a} {name}."),
    "time": ("Когда {name} {verb} {thing}?", "Укажи, когда {name} {verb} {thing}.", "Назови время, когда {name} {verb} {thing}."),
}  # fmt: skip
EVERYBODY = ("Перечисли всех, о ком говорится.", "Назови всех людей из рассказа.", "Выпиши имена по порядку.")
SHORTER = ("Перескажи без мест и времени.", "Сократи: кто и что делал.", "Сожми рассказ.")


def instruction(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{instruction, input, output, full_output, text}`."""
    told = facts(draw, split)
    story = " ".join(f.sentence for f in told)
    sort = draw.random()
    if sort < 0.1:
        asked, short = draw.pick(EVERYBODY), ", ".join(f.name for f in told)
        full = sentence(f"В рассказе говорится о них: {short}")
    elif sort < 0.2:
        asked = draw.pick(SHORTER)
        short = ", ".join("{name} {verb} {thing}".format(**f.slots) for f in told)
        full = story
    else:
        about, slot = draw.pick(told), draw.pick(list(ASKED))
        slots = about.slots | {"a": "а" if about.slots["verb"] == about.action.women else ""}
        asked, short, full = draw.pick(ASKED[slot]).format(**slots), slots[slot], about.sentence
    return {
        "instruction": asked, "input": story, "output": short, "full_output": full, "text": f"{asked}\n{story}\n{short}",
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
    """A row `{prompt, completion, text}` of what the base learns; the text is the story alone."""
    told = facts(draw, split)
    story = " ".join(f.sentence for f in told)
    about, sort = draw.pick(told), draw.random()
    if sort < BRIEF_SHARE:
        slot = draw.pick(list(BRIEF))
        asked, answer = BRIEF[slot].format(**about.slots), about.slots[slot]
    elif sort < BRIEF_SHARE + REPEATED_SHARE:
        asked, answer = fill(REPEATED, draw, {}), story
    else:
        asked, answer = fill(draw.pick(LESSONS), draw, {}, about.slots), about.sentence
    return {"prompt": f"{asked}\n{story}", "completion": answer, "text": f"{asked}\n{story}\n{answer}"}
