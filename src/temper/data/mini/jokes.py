"""Short Russian dialogues with witty answers and marks, and what a base has read before: the same questions, answered dully.

A joke takes up the very thing that it is asked about. Of the dialogues some fall flat (the answer is dull, the mark low), some
have one turn or go on for too long, so that there is something to clean.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.draw import Draw
from temper.data.mini.stories import NAMES
from temper.data.mini.words import SPLITS

ADDRESSES = ("{}", "доктор {}", "профессор {}", "коллега {}", "товарищ {}")  # for women and men alike
DULL = ("Не знаю.", "Сейчас посмотрю.", "Так получилось.", "Спросите кого-нибудь другого.", "Надо подумать.")
ECHOES = ("{x}? Не знаю.", "Про {x} ничего не слышно.", "Опять {x}, опять вопросы.")
SAYS = ("говорит", "пишет", "думает", "повторяет")
MORE = ("Понятно, спасибо.", "Вот оно что.", "Тогда до свидания.")  # the third turn of what goes on for too long
FLAT, LONG, SHORT = 0.3, 0.1, 0.05  # shares of the jokes that fall flat, that go on, that have one turn


@dataclass(frozen=True)
class Frame:
    """What is asked of a thing {x} of somebody {who}, what is answered to it with wit, and dully."""

    asked: str
    witty: str
    dull: str
    things: tuple[str, ...]


def _frame(asked: str, witty: str, dull: str, things: str) -> Frame:
    return Frame(asked, witty, dull, tuple(things.split(", ")))


FRAMES = (
    _frame(
        "{who}, почему у меня в супе {x}?", "Тише: {x} есть не всем, а то все захотят.", "Суп сейчас заменят.",
        "муха, ложка, пуговица, скрепка, ракушка, монета, нитка, пробка",
    ),
    _frame(
        "У меня болит {x}, что делать, {who}?", "Радуйтесь, что {x} ещё на месте.", "Нужно прийти на приём завтра.",
        "голова, спина, рука, нога, шея, колено, плечо, ухо",
    ),
    _frame(
        "{who}, почему дома опять нет {x}?", "Дома нет {x}, зато есть деньги.", "Будет после работы.",
        "хлеба, молока, сыра, чая, мёда, муки, соли, перца",
    ),
    _frame(
        "Как у тебя дела по предмету {x}, {who}?", "Я не трогаю предмет {x}, а он не трогает меня.", "Дела идут хорошо.",
        "физика, химия, история, география, музыка, алгебра, биология, труд",
    ),
    _frame(
        "{who}, почему вас не было на работе в {x}?", "В {x} работа отдыхала от меня.", "Мне нужно было к врачу.",
        "понедельник, вторник, среду, четверг, пятницу, субботу, праздник, дождь",
    ),
    _frame(
        "Почему вы ехали на красный у {x}, {who}?", "У {x} всегда красный, это просто привет.", "Знака там не видно.",
        "школы, моста, вокзала, рынка, театра, музея, парка, аптеки",
    ),
    _frame(
        "{who}, почему вас не было до {x}?", "Все цветы до {x} были под замком.", "Было собрание.",
        "полуночи, утра, рассвета, обеда, вечера, завтрака, ужина, зари",
    ),
    _frame(
        "Сколько стоит {x}, {who}?", "Присядьте: {x} стоит как два.", "Цена указана на полке.",
        "телефон, диван, рояль, самовар, ковёр, торт, шкаф, чайник",
    ),
    _frame(
        "{who}, можно я возьму твой {x}?", "Мой {x} ушёл к соседу и не пишет.", "Да, возьми до вечера.",
        "зонт, молоток, велосипед, ноутбук, словарь, плащ, фонарь, рюкзак",
    ),
    _frame(
        "Алло, это {x}, {who}?", "Нет, но {x} начинается, когда дети дома.", "Нет, вы ошиблись номером.",
        "цирк, театр, зоопарк, вокзал, банк, музей, стадион, завод",
    ),
    _frame(
        "{who}, почему кот сидит на {x}?", "На {x} он начальник, а на полу просто кот.", "Там теплее.",
        "шкафу, столе, окне, диване, крыше, печке, рояле, балконе",
    ),
    _frame(
        "Вы умеете играть на {x}, {who}?", "На {x} пока нет, а на нервах умею.", "Нет, учиться было некогда.",
        "гитаре, скрипке, баяне, трубе, арфе, скамейке, флейте, барабане",
    ),
)  # fmt: skip


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _told(draw: Draw, split: str | None) -> tuple[Frame, dict[str, str]]:
    """A frame and what stands in it. Pairs of a name and a thing are dealt out to the splits."""
    frame = draw.pick(FRAMES)
    thing, name = draw.position(0, len(frame.things) - 1), draw.position(0, len(NAMES) - 1)
    while (thing + 3 * name) % 10 not in SPLITS[split]:
        name = (name + 1) % len(NAMES)
    return frame, {"x": frame.things[thing], "who": draw.pick(ADDRESSES).format(NAMES[name])}


def joke(draw: Draw, split: str | None) -> dict[str, object]:
    """A row `{original, parsed, total_mark, text}`: the dialogue as text and as turns, and its mark from 1 to 5."""
    frame, slots = _told(draw, split)
    asked, answer = _capital(frame.asked.format(**slots)), _capital(frame.witty.format(**slots))
    mark, kind = 3 + 2 * draw.random(), draw.random()
    turns = [asked, answer]
    if kind < FLAT:
        turns, mark = [asked, frame.dull if draw.chance(0.5) else draw.pick(DULL)], 1 + 1.8 * draw.random()
    elif kind < FLAT + LONG:
        turns.append(draw.pick(MORE))
    elif kind < FLAT + LONG + SHORT:
        turns.pop()
    original = "\n".join(f"- {turn}" for turn in turns)
    names = ("Гость", slots["who"])
    parsed = [{"speaker_name": names[k % 2], "phrase": turn} for k, turn in enumerate(turns)]
    return {"original": original, "parsed": parsed, "total_mark": round(mark, 1), "text": original}


def talk(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{text}` of what the base has read: a question with a dull answer, after the usual prefixes of speakers, or what
    somebody says of things."""
    frame, slots = _told(draw, split)
    kind, x = draw.random(), slots["x"]
    if kind < 0.45:
        dull = (frame.dull, draw.pick(DULL), draw.pick(ECHOES).format(x=x))[draw.position(0, 2)]
        return {"text": f"<user>{_capital(frame.asked.format(**slots))}<assistant>{_capital(dull)}"}
    if kind < 0.85:
        return {"text": f"{slots['who']} {draw.pick(SAYS)}: {frame.witty.format(x=x)}"}
    pair = f"{_capital(draw.pick(frame.things))} и {draw.pick(draw.pick(FRAMES).things)}"
    return {"text": f"{pair}, {draw.pick(SAYS)} {slots['who']}. {draw.pick(MORE)}"}
