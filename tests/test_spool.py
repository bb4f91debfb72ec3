"""Rows on disk: the same rows as in memory, again and again, in the memory of a block."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temper
from temper.data import spool
from temper.data.digests import Digests
from temper.data.spool import Spool, View, at, chosen, joined, mapped
from temper.runfolder import read_json
from temper.types import Record

ODD = datetime.date(2026, 1, 2)


def records(n: int) -> list[Record]:
    """Of lengths that do not fit a block, with half a surrogate pair, and every seventh with a date."""
    made: list[Record] = []
    for k in range(n):
        row: dict[str, Any] = {"text": "їжак \ud83d " * (k % 5), "n": k, "parts": [{"x": None}, True, 2.5]}
        made.append(Record(row | ({"day": ODD} if k % 7 == 3 else {}), f"f:{k}"))
    return made


@pytest.mark.parametrize("block", [1, 64, 300, 2**20])
def test_a_spool_has_the_records_it_was_given(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BLOCK", block)
    wanted = records(40)
    rows = Spool(iter(wanted), tmp_path)
    assert not list(tmp_path.iterdir())  # no name, nothing to clean up
    assert list(rows) == wanted == list(rows) and len(rows) == 40
    assert [rows[k] for k in (39, 0, -1, 17, 17, 3)] == [wanted[k] for k in (39, 0, -1, 17, 17, 3)]
    assert rows[:3] == wanted[:3] and rows[5:30:7] == wanted[5:30:7]
    with pytest.raises(IndexError):
        rows[40]
    both = [(a.where, b.where) for a in rows[:3] for b in rows]  # one iteration within another
    assert len(both) == 120 and both[41] == ("f:1", "f:1")
    assert list(Spool(iter(()), tmp_path)) == []


@pytest.mark.parametrize("kind", ["list", "spool", "view"])
def test_what_is_chosen_of_any_of_them(kind: str, tmp_path: Path) -> None:
    wanted, places = records(50), np.array([0, 3, 4, 31, 49])
    held: Any = {"list": wanted, "spool": Spool(wanted, tmp_path), "view": View(50, lambda: iter(wanted))}[kind]
    some = chosen(held, places)
    assert list(some) == [wanted[k] for k in places] == list(some) and len(some) == 5
    assert isinstance(some, list) == (kind == "list")
    again = chosen(some, np.array([1, 4]))
    assert list(again) == [wanted[3], wanted[49]] and not list(chosen(held, places[:0]))
    assert at(held, [31, 2, 31]) == [wanted[31], wanted[2], wanted[31]] and at(held, []) == []
    assert list(mapped(some, lambda r: r.row["n"])) == places.tolist()
    assert [r.where for r in joined(some, again)][-3:] == ["f:49", "f:3", "f:49"] and len(joined(some, again)) == 7


def test_digests_tell_what_stands_where_first() -> None:
    here, there = Digests(), Digests()
    for place, text in ((0, "a"), (2, "b"), (5, "a"), (6, "c"), (9, "a")):
        here.add(place, text)
    for place, text in ((1, "x"), (4, "c"), (7, "a"), (8, "c")):
        there.add(place, text)
    assert here.repeated().tolist() == [5, 9] and there.repeated().tolist() == [8]
    found = here.standing_in(there)
    assert [x.tolist() for x in found] == [[0, 5, 6, 9], [7, 7, 4, 7]]
    assert [len(x) for x in here.standing_in(Digests())] == [0, 0] == [len(x) for x in Digests().standing_in(here)]


STAGE = """
import json, sys
from pathlib import Path
from temper import stages
from temper.app import run_recipe
folder = Path(sys.argv[1])
def status(key):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
run_recipe(folder / "small.yaml", out=folder / "small", quiet=True)
before = status("VmHWM:")
run_recipe(folder / "recipe.yaml", out=folder / "run", quiet=True)
print(json.dumps((status("VmHWM:") - before) / 1024))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read off Linux's /proc")
def test_the_memory_of_a_data_stage_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    """30,000 rows more, 30 MB as text, hardly show in the peak; in memory they would take several times that."""
    text = "ein Satz von einiger Länge, der sich wiederholt, " * 20
    for name, n in (("small", 15_000), ("recipe", 45_000)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"p": f"{k}", "c": f"{k} {text}"}) + "\n" for k in range(n)))  # fmt: skip
        stage = {
            "stage": "data", "source": f"{name}.jsonl", "prompt": "Was ist {p}?", "completion": "{c}",
            "drop": {"contains": ["17"]}, "near_leaks": False,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"name": name, "stages": {"rows": stage}}))
    environment = {**os.environ, "PYTHONPATH": str(Path(temper.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", STAGE, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    more = (len(text) + 30) * 30_000 / 2**20
    assert more > 28 and json.loads(done.stdout.splitlines()[-1]) < more / 2
    card = read_json(tmp_path / "run" / "rows" / "card.json")
    assert card["rows_in"] == 45_000 and card["dropped"] == {
        "contains «17»": sum("17" in str(k) for k in range(45_000))
    }
