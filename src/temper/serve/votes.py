"""What people said of answers, in SQLite: two answers to one prompt, who wrote which, and a verdict."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from temper.errors import RunError

Side = Literal["left", "right"]
Verdict = Literal["left", "right", "tie", "both_bad"]
Talk = list[dict[str, str]]
VERSION = 1  # of the tables

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    item TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL, text TEXT NOT NULL, ended INTEGER NOT NULL,
    PRIMARY KEY (item, model, settings));
CREATE TABLE IF NOT EXISTS battles (
    id TEXT PRIMARY KEY, begun REAL NOT NULL, who TEXT NOT NULL, item TEXT, messages TEXT NOT NULL, settings TEXT NOT NULL,
    left_model TEXT NOT NULL, right_model TEXT NOT NULL, left_text TEXT, right_text TEXT, left_ended INTEGER, right_ended INTEGER,
    verdict TEXT CHECK (verdict IN ('left', 'right', 'tie', 'both_bad')), judged REAL);
CREATE INDEX IF NOT EXISTS of_items ON battles (item, who);
"""


@dataclasses.dataclass(frozen=True)
class Battle:
    """Two answers to one prompt, and what somebody said of them; `item` is None where the prompt was free."""

    id: str
    begun: float
    who: str
    item: str | None
    messages: Talk
    settings: dict[str, Any]
    models: dict[Side, str]
    texts: dict[Side, str | None]
    ended: dict[Side, bool]
    verdict: Verdict | None
    judged: float | None

    @property
    def written(self) -> bool:
        """Whether both answers are finished."""
        return None not in self.texts.values()


class Votes:
    """A file of votes; another process may read it at the same time.

    Raises:
        RunError: it cannot be opened, or is no file of votes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self.base.row_factory = sqlite3.Row
            (version,) = self.base.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise RunError(f"{path} was written by another version of Temper (tables of version {version})", do="name another file: --votes FILE")
            there = {name for (name,) in self.base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if there and not (version and there >= {"answers", "battles"}):  # nothing of it has been changed yet
                raise RunError(f"{path} is a database of something else", do="name another file: --votes FILE")
            self.base.execute("PRAGMA journal_mode = WAL")
            self.base.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"votes cannot be kept in {path}: {error}", do="name another file: --votes FILE") from None

    def _do(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self.lock:
            return self.base.execute(sql, values).fetchall()

    def begin(
        self, id: str, who: str, messages: Talk, models: Mapping[Side, str], settings: dict[str, Any], *, item: str | None = None
    ) -> None:
        """Enter two models that will answer."""
        self._do(
            "INSERT INTO battles (id, begun, who, item, messages, settings, left_model, right_model) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (id, time.time(), who, item, _json(messages), _json(settings), models["left"], models["right"]),
        )

    def write(self, id: str, side: Side, text: str, ended: bool) -> None:
        """What one of them answered; the first that is told stays."""
        assert side in ("left", "right")
        self._do(f"UPDATE battles SET {side}_text = ?, {side}_ended = ? WHERE id = ? AND {side}_text IS NULL", (text, ended, id))

    def judge(self, id: str, verdict: Verdict, who: str) -> bool:
        """Enter a verdict, once; False where there is one already."""
        with self.lock:
            done = self.base.execute(
                "UPDATE battles SET verdict = ?, judged = ?, who = ? WHERE id = ? AND verdict IS NULL", (verdict, time.time(), who, id)
            )
            return done.rowcount == 1

    def battle(self, id: str) -> Battle | None:
        return next(self._battles("WHERE id = ?", (id,)), None)

    def judged(self) -> list[Battle]:
        """All that have a verdict, in the order of the verdicts."""
        return list(self._battles("WHERE verdict IS NOT NULL ORDER BY judged, id", ()))

    def of_items(self, who: str) -> list[Battle]:
        """What somebody was shown of a list of items, with a verdict or not yet."""
        return list(self._battles("WHERE item IS NOT NULL AND who = ?", (who,)))

    def _battles(self, where: str, values: Sequence[Any]) -> Iterator[Battle]:
        for row in self._do(f"SELECT * FROM battles {where}", values):
            yield Battle(
                row["id"], row["begun"], row["who"], row["item"], json.loads(row["messages"]), json.loads(row["settings"]),
                {"left": row["left_model"], "right": row["right_model"]}, {"left": row["left_text"], "right": row["right_text"]},
                {"left": bool(row["left_ended"]), "right": bool(row["right_ended"])}, row["verdict"], row["judged"],
            )  # fmt: skip

    def answer(self, item: str, model: str, settings: dict[str, Any]) -> tuple[str, bool] | None:
        """What a model answered to an item, if it was asked so already, and whether it ended by itself."""
        found = self._do("SELECT text, ended FROM answers WHERE item = ? AND model = ? AND settings = ?", (item, model, _json(settings)))
        return (found[0]["text"], bool(found[0]["ended"])) if found else None

    def keep(self, item: str, model: str, settings: dict[str, Any], text: str, ended: bool) -> None:
        """Everybody is shown the same answer to an item: the first that was kept."""
        self._do("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", (item, model, _json(settings), text, ended))

    def close(self) -> None:
        with self.lock:
            self.base.close()


def preferences(battles: Sequence[Battle]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Votes as rows of preferences, and how many votes are left out, by reason.

    A vote for one of two different answers is a row. Prompts that are all single messages of the user are plain text, else
    all rows are conversations: a column has one kind.
    """
    left_out = {"tie": 0, "both_bad": 0, "equal answers": 0, "an empty answer": 0}
    taken: list[tuple[Battle, Side, Side]] = []
    for battle in battles:
        if battle.verdict in ("tie", "both_bad", None):
            left_out[battle.verdict or "tie"] += 1
            continue
        better: Side = battle.verdict
        worse: Side = "right" if better == "left" else "left"
        if battle.texts[better] == battle.texts[worse]:
            left_out["equal answers"] += 1
        elif not (battle.texts[better] or "").strip() or not (battle.texts[worse] or "").strip():
            left_out["an empty answer"] += 1
        else:
            taken.append((battle, better, worse))
    plain = all(len(b.messages) == 1 and b.messages[0]["role"] == "user" for b, _, _ in taken)

    def said(text: str | None) -> Any:
        return text if plain else [{"role": "assistant", "content": text}]

    rows = [
        {
            "prompt": b.messages[0]["content"] if plain else b.messages, "chosen": said(b.texts[better]),
            "rejected": said(b.texts[worse]), "chosen_model": b.models[better], "rejected_model": b.models[worse], "who": b.who,
        }
        for b, better, worse in taken
    ]  # fmt: skip
    return rows, {reason: n for reason, n in left_out.items() if n}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
