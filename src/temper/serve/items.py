"""A fixed list of prompts to be judged: each by everybody, on each two models, blind and in an order of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from itertools import combinations
from pathlib import Path

from temper.data import sources
from temper.data.forms import Format, asked
from temper.errors import DataError
from temper.serve.votes import Battle, Side, Talk
from temper.types import Row


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt; `id` stands for what it says."""

    id: str
    messages: Talk


@dataclasses.dataclass(frozen=True)
class Task:
    """An item, and the models that are to be compared on it, as they will be shown."""

    item: Item
    models: dict[Side, str]


def read(source: str, rows: int | None) -> list[Item]:
    """The prompts of a source, each once.

    Raises:
        DataError: there is no such source; a row without a prompt.
    """
    out: dict[str, Item] = {}
    for record in sources.read(source, base=Path(), rows=rows).records:
        messages = _messages(record.row, record.where)
        key = hashlib.sha256(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:24]
        out.setdefault(key, Item(key, messages))
    if not out:
        raise DataError(f"{source} has no rows", do="--items takes rows with a prompt, such as runs/NAME/DATA/data/test.parquet")
    return list(out.values())


def _messages(row: Row, where: str) -> Talk:
    if row.keys() & {"prompt", "messages"} and row.get("prompt", True):
        found = asked(row, Format())
        if found and all(isinstance(m.get("content"), str) for m in found) and found[-1]["content"].strip():
            return [{"role": m["role"], "content": m["content"]} for m in found]
    raise DataError("a row without a prompt cannot be judged", where=where, do="give rows with «prompt» or «messages»")


class List:
    """What is to be judged.

    Args:
        models: those that are compared, each two of them.
    """

    def __init__(self, name: str, items: list[Item], models: list[str]) -> None:
        self.name, self.items = name, items
        self.couples = list(combinations(sorted(models), 2))

    @property
    def total(self) -> int:
        """Verdicts of one person."""
        return len(self.items) * len(self.couples)

    def tasks(self, who: str) -> list[Task]:
        """All of one person's, in an order and with sides that are drawn from the name: the same when it comes back."""

        def number(*parts: str) -> bytes:
            return hashlib.sha256("\0".join((who, *parts)).encode()).digest()

        found = [(item, a, b) for item in self.items for a, b in self.couples]
        found.sort(key=lambda one: number("order", one[0].id, one[1], one[2]))
        out = []
        for item, a, b in found:
            left, right = (a, b) if number("side", item.id, a, b)[0] % 2 else (b, a)
            out.append(Task(item, {"left": left, "right": right}))
        return out

    def open(self, who: str, seen: list[Battle]) -> tuple[list[Task], int]:
        """One person's tasks that have no verdict yet, and how many have one."""
        done = {(b.item, *sorted(b.models.values())) for b in seen if b.verdict is not None}
        tasks = self.tasks(who)
        left = [t for t in tasks if (t.item.id, *sorted(t.models.values())) not in done]
        return left, len(tasks) - len(left)
