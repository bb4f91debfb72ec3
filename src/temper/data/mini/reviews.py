"""Reviews of films that do not exist, for and against.

A review opens neutrally, tells of the plot, and then makes remarks. The label is drawn first, and most remarks agree with
it, but not all: some reviews can be told only by weighing, and a few cannot be told at all. A classifier that has
understood everything is right on 99.3 % of them.
"""

from __future__ import annotations

from temper.data.mini.draw import Draw
from temper.data.mini.grammar import fill, sentence
from temper.data.mini.review_frames import FIRST, Frames
from temper.data.mini.review_frames_b import SECOND
from temper.data.mini.review_words import FACTS, GROUPS, NEUTRAL, QUALITIES, TITLE_FIRST, TITLE_SECOND, Group, own
from temper.data.mini.words import SPLITS

LABELS = ("positive", "negative")  # the order of every pair of vocabularies
AGREES = 0.96  # a remark has the label's sign
CLOSES = 0.7  # there is a closing remark, whose sign is the label's
NEGATES = 0.1  # a sign is said by denying the other one
MIXED = 0.1  # a remark grants something to the other side first
LENGTH, OPENING = (25, 60), (4, 9)  # words, both ends included


class Reviewer:
    """One set's frames and the words that it does not leave out."""

    def __init__(self, frames: Frames, which: int) -> None:
        self.frames = frames
        self.groups = [
            Group(
                g.subjects,
                (own(g.adjectives[0], which), own(g.adjectives[1], which)),
                (own(g.predicates[0], which), own(g.predicates[1], which)),
            )
            for g in GROUPS
        ]
        self.qualities = tuple(own(words, which) for words in QUALITIES)

    def review(self, draw: Draw, split: str | None) -> dict[str, str]:
        """A row `{text, label, opening, rest, title}`; text = opening + " " + rest."""
        while True:
            row = self._written(draw, split)
            if _fits(row["text"], LENGTH) and _fits(row["opening"], OPENING):
                return row

    def _written(self, draw: Draw, split: str | None) -> dict[str, str]:
        name, label = title(draw, split), draw.position(0, 1)
        facts = {"T": name} | {fact: draw.pick(NEUTRAL[fact]) for fact in FACTS}
        head, tails = draw.pick(self.frames.heads)
        tail = draw.pick(tails)
        opening = sentence(fill(head, draw, NEUTRAL, facts)).rstrip(".")
        told = any(slot in head + tail for slot in ("{who}", "{plot}", "{place}", "{job}"))
        sentences = [
            sentence(f"{opening} {fill(tail, draw, NEUTRAL, facts)}"),
            *self._neutral(draw, facts, told),
            *self._remarks(draw, facts, label),
        ]
        rest = " ".join(sentences)[len(opening) + 1 :]
        return {"text": f"{opening} {rest}", "label": LABELS[label], "opening": opening, "rest": rest, "title": name}

    def _neutral(self, draw: Draw, facts: dict[str, str], told: bool) -> list[str]:
        story = self.frames.events if told else self.frames.plots
        pools = [story] * draw.chance(0.7) + [self.frames.asides] * draw.chance(0.25)
        return [sentence(fill(draw.pick(pool), draw, NEUTRAL, facts)) for pool in pools]

    def _remarks(self, draw: Draw, facts: dict[str, str], label: int) -> list[str]:
        """Two or three remarks, and mostly a closing one; where the sign changes, a word may say so."""
        out: list[str] = []
        before: int | None = None
        groups = list(self.groups)
        for _ in range(draw.position(2, 3)):
            sign = label if draw.chance(AGREES) else 1 - label
            group = groups.pop(draw.position(0, len(groups) - 1))  # no two remarks on the same thing
            link = "" if before is None else draw.pick(self.frames.going_on if sign == before else self.frames.turning)
            out.append(sentence(link + self._remark(group, sign, draw)))
            before = sign
        if draw.chance(CLOSES):
            pool = (self.frames.reactions if draw.chance(0.5) else self.frames.verdicts)[label]
            out.append(sentence(fill(draw.pick(pool), draw, NEUTRAL, facts)))
        return out

    def _remark(self, group: Group, sign: int, draw: Draw) -> str:
        main = self._clause(group, sign, draw)
        if not draw.chance(MIXED):
            return main
        another = draw.pick([g for g in self.groups if g is not group])
        other = self._clause(another, 1 - sign, draw)
        return fill(draw.pick(self.frames.mixed), draw, {}, {"main": main, "other": other})

    def _clause(self, group: Group, sign: int, draw: Draw) -> str:
        """One thing said of the group's subject, or of the whole film; without a capital or a full stop."""
        frames, sort, denies = self.frames, draw.random(), draw.chance(NEGATES)
        said = 1 - sign if denies else sign
        if sort < 0.2:
            slots = {"q": draw.pick(self.qualities[said])}
            return fill(draw.pick(frames.lacking if denies else frames.having), draw, {}, slots)
        subject = draw.pick(group.subjects)
        slots = _agreeing(subject)
        if sort < 0.45:
            return f"{slots['N']} {fill(draw.pick(group.predicates[sign]), draw, {}, slots)}"
        slots["x"] = draw.pick(group.adjectives[said])
        slots["y"] = draw.pick([word for word in group.adjectives[said] if word != slots["x"]])
        return fill(draw.pick(frames.negating if denies else frames.direct), draw, {}, slots)


def title(draw: Draw, split: str | None) -> str:
    """A film of the split. Pairs of words are dealt out to the splits, as the people of the news are."""
    second = draw.position(0, len(TITLE_SECOND) - 1)
    first = draw.position(0, len(TITLE_FIRST) - 1)
    while (second + 3 * first) % 10 not in SPLITS[split]:
        first = (first + 1) % len(TITLE_FIRST)
    return f"{draw.pick(('The ', 'The ', ''))}{TITLE_FIRST[first]} {TITLE_SECOND[second]}"


_SINGULAR = {"is": "is", "has": "has", "does": "does", "their": "its", "s": "s", "es": "es", "ies": "ies"}
_PLURAL = {"is": "are", "has": "have", "does": "do", "their": "their", "s": "", "es": "", "ies": "y"}


def _agreeing(subject: str) -> dict[str, str]:
    """The subject and the endings that its number asks for."""
    return {"N": subject.rstrip("+")} | (_PLURAL if subject.endswith("+") else _SINGULAR)


def _fits(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text.split()) <= bounds[1]


REVIEWER_A = Reviewer(FIRST, 0)
REVIEWER_B = Reviewer(SECOND, 1)
