"""Sentences from rules: «[a|b]» is a choice on the spot, «{name}» a rule's choice or a slot that was filled beforehand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from temper.data.mini.draw import Draw

_OPEN = re.compile(r"\[([^\[\]]*)\]|\{([^{}]*)\}")  # innermost first, so choices may stand within choices
# «a» before a vowel that is heard: «an old», «an hour», but «a one-man show», «a used car», «a unit».
_ARTICLE = re.compile(r"\b([Aa]) (?=(?!one|uni|use|eu)[aeiou]|hour|hones|heir)", re.IGNORECASE)


def fill(template: str, draw: Draw, rules: Mapping[str, Sequence[str]], slots: Mapping[str, str] | None = None) -> str:
    """The template with every choice made and every name replaced, from left to right.

    Args:
        rules: name → templates, one of which is drawn each time the name occurs.
        slots: name → text, the same wherever the name occurs; goes before `rules`.

    >>> fill("{who} [saw|saw] {it}.", Draw("any"), {"who": ["a {kind} man"], "kind": ["old"]}, {"it": "The Blue Door"})
    'a old man saw The Blue Door.'
    """
    slots = slots or {}
    while match := _OPEN.search(template):
        if match[1] is not None:
            chosen = draw.pick(match[1].split("|"))
        else:
            chosen = slots[match[2]] if match[2] in slots else draw.pick(rules[match[2]])
        template = template[: match.start()] + chosen + template[match.end() :]
    return template


def sentence(text: str) -> str:
    """A capital at the beginning, a full stop where no other mark ends it, and «an» where a vowel follows.

    >>> sentence("a old sailor buys a unicycle")
    'An old sailor buys a unicycle.'
    """
    text = _ARTICLE.sub(lambda match: f"{match[1]}n ", text)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
