"""Questions of how to do something by hand, each with a good answer and a worse one; and what a small base has read.

A good answer is courteous (it calls the one who asks by name) and is about the very thing and means of the question. A
worse one is curt, rude, or courteous about something else. What demonstrates answers to `sft` is of either kind, as
demonstrations gathered by hand are: likelihood alone cannot tell them apart, and preferences can.
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.advice_words import CLOSING, COURTEOUS, CURT, DAYS, NAMES, PLACES, RUDE, WORKS, Work
from temper.data.mini.draw import Draw
from temper.data.mini.grammar import fill, sentence
from temper.data.mini.words import SPLITS

FORM = "{prompt}\nAdvice: {answer}"
WORSE_SHARE = 0.5  # of the demonstrations
CURT_SHARE, RUDE_SHARE = 0.35, 0.35  # of the worse answers; the rest are courteous, and wrong
# Of the corpus: documents in the form of the questions, answered as a raw model would, by saying the question again. All
# others have other forms; in most of them the things and names that stand at the beginning come again, for a model
# of two layers learns to copy only where there is much to copy.
ASKED_SHARE = 0.12


@dataclass(frozen=True)
class Question:
    """Who wants to do what to which thing by which means."""

    name: str
    work: Work
    kind: str
    object: str
    means: str

    @property
    def thing(self) -> str:
        return f"{self.kind} {self.object}"

    @property
    def one(self) -> str:
        """The thing, with an article where it is one thing."""
        return self.thing if self.work.verb == "store" else f"a {self.thing}"

    @property
    def text(self) -> str:
        return sentence(f"{self.name} asks how to {self.work.verb} {self.one} with {self.means}")

    def slots(self, draw: Draw) -> dict[str, str]:
        """What frames of answers hold, the three steps among it."""
        held = {"name": self.name, "thing": self.thing, "object": self.object, "means": self.means, "one": self.one}
        held |= {"verb": self.work.verb, "past": self.work.past}
        names = ("first", "second", "third")
        return held | {n: fill(draw.pick(s), draw, {}, held) for n, s in zip(names, self.work.steps, strict=True)}


def question(draw: Draw, split: str | None) -> Question:
    """A question of the split. Pairs of a name and an object are dealt out to the splits."""
    work = draw.pick(WORKS)
    thing, name = draw.position(0, len(work.objects) - 1), draw.position(0, len(NAMES) - 1)
    while (thing + 3 * name) % 10 not in SPLITS[split]:
        name = (name + 1) % len(NAMES)
    return Question(NAMES[name], work, draw.pick(work.kinds), work.objects[thing], draw.pick(work.means))


def advice(draw: Draw, split: str | None) -> dict[str, str]:
    """A row `{prompt, chosen, rejected, completion, text}`; the completion is one of the two answers."""
    asked = question(draw, split)
    chosen, rejected = good(asked, draw), worse(asked, draw)
    completion = rejected if draw.chance(WORSE_SHARE) else chosen
    row = {"prompt": asked.text, "chosen": chosen, "rejected": rejected, "completion": completion}
    return row | {"text": FORM.format(prompt=asked.text, answer=completion)}


def good(asked: Question, draw: Draw) -> str:
    """Courteous, and about what was asked."""
    slots = asked.slots(draw)
    return _said(draw.pick(COURTEOUS), slots, draw) + fill(draw.pick(CLOSING), draw, {}, slots)


def worse(asked: Question, draw: Draw) -> str:
    """Curt, rude, or courteous about another thing or other means."""
    sort = draw.random()
    if sort < CURT_SHARE + RUDE_SHARE:
        return _said(draw.pick(CURT if sort < CURT_SHARE else RUDE), asked.slots(draw), draw)
    work, kind, thing, means = asked.work, asked.kind, asked.object, asked.means
    if draw.chance(0.6):
        kind = draw.pick([k for k in work.kinds if k != kind])
        thing = draw.pick([o for o in work.objects if o != thing])
    else:
        means = draw.pick([m for m in work.means if m != means])
    return good(Question(asked.name, work, kind, thing, means), draw)


def _said(frame: str, slots: dict[str, str], draw: Draw) -> str:
    """A frame filled in, with a capital behind each mark that ends a sentence."""
    filled = fill(frame, draw, {}, slots)
    for mark in (". ", "? "):
        filled = mark.join(part[0].upper() + part[1:] for part in filled.split(mark))
    return sentence(filled)


_DOCUMENTS = [
    # Two people and two things each: what was said of them comes again, and by no other way than by looking back.
    "On {day} {name} {past} {one} with {means} {place}. {other_name} {other_past} {other_one} with {other_means}. In the "
    "evening {name} showed the {thing} to {other_name}, and {other_name} showed the {other_thing} to {name}.",
    "To do on {day}. {name}: {verb} the {thing} with {means}. {other_name}: {other_verb} the {other_thing} with "
    "{other_means}. Done: {name} {past} the {thing} with {means}, {other_name} {other_past} the {other_thing} with "
    "{other_means}.",
    "{name} needs {means} for the {thing}. Will {other_means} do? No, says {other_name}, for the {thing} {name} needs "
    "{means}. {place} {name} finds {means} on {day}.",
    "{name} wrote down how to {verb} the {thing}. {first}. {second}. {third}. For the {thing} you need {means}.",
    "Dear {other_name}, on {day} I want to {verb} the {thing} with {means}, and {name} will {other_verb} the "
    "{other_thing}. Please bring {means} for the {thing} and {other_means} for the {other_thing}. Yours, {name}.",
    "{name}: How do I {verb} {one}? {other_name}: {first}, and {second}. {name}: And then, {other_name}? {other_name}: "
    "Then {third}, {name}. {name}: So with {means}. {other_name}: Yes, with {means}.",
    "{other_name} went to {name} because of the {other_thing}, and {name} said: {other_first} and {other_second}. Then "
    "{other_third}. So {other_name} {other_past} the {other_thing} with {other_means} on {day}.",
    "Lost {place}: {one} and {other_one}. The {thing} belongs to {name}, the {other_thing} to {other_name}. Please tell "
    "{name} or {other_name} on {day}.",
    "What {name} said on {day}: [please|gladly|of course], {first}. What {other_name} said: [everybody knows that|what a "
    "silly question|such nonsense], {other_second}. So {name} {past} the {thing}, and {other_name} {other_past} the "
    "{other_thing}.",
]
_LAZY = [
    "You want to {verb} {one} with {means}.",
    "{name} asks about {one} and {means}.",
    "To {verb} {one} with {means}, ask {other_name}.",
    "{one}, {means}, {name}.",
]


def base_document(draw: Draw, split: str | None) -> dict[str, str]:
    """A document `{text}` of the base's corpus."""
    asked = other = question(draw, split)
    while other.name == asked.name or other.object == asked.object:
        other = question(draw, split)
    slots = asked.slots(draw) | {f"other_{key}": value for key, value in other.slots(draw).items()}
    slots |= {"day": draw.pick(DAYS), "place": draw.pick(PLACES)}
    if draw.chance(ASKED_SHARE):
        return {"text": FORM.format(prompt=asked.text, answer=_said(draw.pick(_LAZY), slots, draw))}
    return {"text": _said(draw.pick(_DOCUMENTS), slots, draw)}
