"""worst.jsonl → the validation examples with the highest loss, each token with its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5
# Shades by what probability the model gave the token: from these losses on, 1/2, 1/5, 1/20 and 1/100.
LIMITS = [(math.log(2), "1/2"), (math.log(5), "1/5"), (math.log(20), "1/20"), (math.log(100), "1/100")]
NUMBERED = 3  # from this shade on the loss stands beside the token, for those who do not see colours


@dataclass(frozen=True)
class Token:
    """A token as it is drawn; without a loss it was only read."""

    text: str
    shade: int  # 0 (likely) … 4 (probability below 1/100); −1: without a loss
    title: str
    number: str = ""


@dataclass(frozen=True)
class Hard:
    """One example: its parts are what branches share, then each branch."""

    where: str
    loss: float
    parts: list[list[Token]]
    left_out: int


@dataclass(frozen=True)
class Hardest:
    """The examples of one validation, the highest loss first."""

    step: int
    whole: bool  # of all validation rows, not of the part that every validation sees
    examples: list[Hard]


def hardest(lines: Sequence[dict[str, Any]]) -> Hardest | None:
    """The last validation's examples; lines that are not what they should be are left out."""
    last = next((line for line in reversed(lines) if isinstance(line.get("step"), int)), None)
    if last is None:
        return None
    step, whole = last["step"], bool(last.get("whole"))
    of_it = [line for line in lines if line.get("step") == step and bool(line.get("whole")) == whole]
    found = [example for line in of_it[:SHOWN] if (example := _example(line)) is not None]
    return Hardest(step, whole, found) if found else None


def legend() -> list[tuple[int, str]]:
    """(shade, what it means)."""
    names = [f"p ≥ {LIMITS[0][1]}"] + [f"p < {name}" for _, name in LIMITS]
    return list(enumerate(names))


def shade(loss: float) -> int:
    """0 for a likely token, 4 for one that had a probability below 1/100.

    >>> [shade(x) for x in (0.1, 0.7, 2.0, 4.0, 9.0)]
    [0, 1, 2, 3, 4]
    """
    return sum(loss > limit for limit, _ in LIMITS)


def _example(line: dict[str, Any]) -> Hard | None:
    try:
        parts = [[_token(t, x) for t, x in zip(part["tokens"], part["losses"], strict=True)] for part in line["parts"]]
        return Hard(str(line["where"]), float(line["loss"]), parts, int(line.get("left_out", 0)))
    except (KeyError, TypeError, ValueError):
        return None


def _token(text: str, loss: float | None) -> Token:
    text = str(text) or "·"  # some bytes of a character that a later token completes
    if loss is None:
        return Token(text, -1, "")
    level = shade(float(loss))
    return Token(text, level, f"{loss:.2f} nats, p = {math.exp(-loss):.2g}", f"{loss:.1f}" if level >= NUMBERED else "")
