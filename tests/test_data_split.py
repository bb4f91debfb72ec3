"""Splits by content, what leaks between them, and the files a data stage leaves."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pyarrow.parquet
import pytest

from temper.data import card as cards
from temper.data import formats, sources
from temper.data.clean import Drop, clean
from temper.data.sources import Source
from temper.data.split import Leaks, leaks, split
from temper.errors import DataError, RecipeError
from temper.types import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"


def rows(count: int, start: int = 0) -> list[Record]:
    return [Record({"prompt": f"question {i}", "completion": str(i)}, f"f:{i}") for i in range(start, start + count)]


def places(splits: dict[str, list[Record]]) -> dict[str, str]:
    return {record.where: name for name, records in splits.items() for record in records}


def test_shares_and_nothing_lost():
    records = rows(4000)
    splits = split(records, validation=0.05, test=0.1)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(r.where for part in splits.values() for r in part) == sorted(r.where for r in records)
    for name, share in (("validation", 0.05), ("test", 0.1)):  # within four standard deviations of a binomial
        assert abs(len(splits[name]) - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    numbers = [int(r.row["completion"]) for r in splits["train"]]
    assert numbers == sorted(numbers)  # order kept
    assert places(splits) == places(split(records)) != places(split(records, seed=1))


def test_adding_removing_and_shuffling_rows_moves_none():
    before = places(split(rows(500)))
    more = rows(2000)
    random.Random(0).shuffle(more)
    after = places(split(more))
    assert all(after[where] == name for where, name in before.items())
    without_test = places(split(rows(500), test=0))
    assert {w for w, n in without_test.items() if n == "validation"} == {
        w for w, n in before.items() if n == "validation"
    }


def test_whole_numbers_of_rows():
    splits = split(rows(300), validation=20, test=50)
    assert {name: len(part) for name, part in splits.items()} == {"train": 230, "validation": 20, "test": 50}
    larger = split(rows(300), validation=20, test=80)
    assert {r.where for r in splits["test"]} < {r.where for r in larger["test"]}
    assert {r.where for r in splits["validation"]} == {r.where for r in larger["validation"]}
    assert set(split(rows(10), validation=0, test=3)) == {"train", "test"}
    assert list(split(rows(10), validation=0, test=0)) == ["train"]


def test_a_share_of_few_rows_still_gives_one():
    for seed in range(30):
        assert all(split(rows(3), validation=0.01, test=0.01, seed=seed).values())
        assert all(split(rows(3), validation=0.4, test=0.55, seed=seed).values())


def test_equal_prompts_stay_together():
    records = [
        Record({"prompt": f" Question {i % 40}" + "\n" * (i % 3), "completion": str(i)}, f"f:{i}") for i in range(400)
    ]
    place = places(split(records, validation=0.2, test=0.3))
    for i in range(40):
        assert len({place[f"f:{j}"] for j in range(i, 400, 40)}) == 1
    chats = [
        Record(
            {"messages": [{"role": "user", "content": f"q{i % 20}"}, {"role": "assistant", "content": str(i)}]},
            f"f:{i}",
        )
        for i in range(200)
    ]
    place = places(split(chats, validation=0.2, test=0.3))
    assert len(set(place.values())) == 3
    assert all(len({place[f"f:{j}"] for j in range(i, 200, 20)}) == 1 for i in range(20))


def test_repeated_texts_stay_together_and_groups_do():
    records = [
        Record({"text": f"Text {i % 50}" if i < 100 else f"tEXT  {i % 50}", "id": i}, f"f:{i}") for i in range(200)
    ]
    place = places(split(records, validation=0.2, test=0.3))
    assert all(len({place[f"f:{j}"] for j in range(i, 200, 50)}) == 1 for i in range(50))
    people = [Record({"text": str(i), "who": i % 30}, f"f:{i}") for i in range(300)]
    place = places(split(people, validation=0.2, test=0.3, group="who"))
    assert all(len({place[f"f:{j}"] for j in range(i, 300, 30)}) == 1 for i in range(30))
    with pytest.raises(DataError, match="did you mean «who»"):
        split(people, group="whom")


def test_what_cannot_be_split():
    with pytest.raises(DataError, match="1 different prompts"):
        split([Record({"prompt": "same", "completion": str(i)}, "") for i in range(50)])
    with pytest.raises(DataError, match="2 rows"):
        split(rows(2))
    for sizes in ({"test": 1.0}, {"test": -1}, {"validation": 0.5, "test": 0.5}, {"test": True}):
        with pytest.raises(RecipeError):
            split(rows(20), **sizes)
    blank = [Record({"prompt": "", "completion": str(i)}, f"f:{i}") for i in range(100)]
    assert len(split(blank, test=20)["test"]) == 20  # no prompt at all: the rest of the row decides


WORDS = [f"w{i}" for i in range(30)]


def test_silence_18_test_rows_in_the_training_data():
    long = " ".join(WORDS)
    train = [
        {"prompt": "a", "completion": "one"},
        {"prompt": "b", "completion": long},
        {"prompt": "c", "completion": "x"},
    ]
    test = [
        {"prompt": "A ", "completion": "One\n"},  # exact, and so is its prompt
        {"prompt": "b", "completion": long.replace("w29", "w99")},  # near, and its prompt is exact
        {"prompt": "c", "completion": "another answer"},  # the prompt alone
        {"prompt": "d", "completion": "nowhere"},
    ]
    splits = {
        "train": [Record(row, f"train:{i}") for i, row in enumerate(train)],
        "validation": [Record({"prompt": "z", "completion": "z"}, "v:0")],
        "test": [Record(row, f"test:{i}") for i, row in enumerate(test)],
    }
    found = leaks(splits)
    assert (found.exact, found.near, found.prompts) == (1, 1, 3)
    assert {"kind": "near", "split": "test", "where": "test:1", "train": "train:1"} in found.examples
    assert leaks(splits, near=False).near == 0
    splits["test"] = splits["test"][3:]
    assert leaks(splits) == Leaks()


def test_a_split_of_rows_with_repeats_does_not_leak():
    random.seed(3)
    records = [Record({"text": f"{random.choice(WORDS)} {random.choice(WORDS)}"}, str(i)) for i in range(400)]
    found = leaks(split(records, validation=0.2, test=0.2))
    assert (found.exact, found.near, found.prompts) == (0, 0, 0)


def test_card():
    source = Source("x.jsonl", [Record({"text": "a" * i}, f"x.jsonl:{i}") for i in range(13)], "ab" * 32)
    cleaned = clean(source.records, Drop(longer_than=10))
    splits = {"train": cleaned.kept[:8], "validation": [], "test": cleaned.kept[8:]}
    made = cards.card(source, splits, cleaned.dropped, Leaks(exact=1, near=2), cut=4)
    assert json.loads(json.dumps(made)) == made
    assert made == {
        "source": "x.jsonl",
        "sha256": "ab" * 32,
        "revision": None,
        "rows_in": 13,
        "rows_out": 10,
        "splits": {"train": 8, "validation": 0, "test": 2},
        "dropped": {"too long": 2, "empty": 1},
        "cut": 4,
        "lengths": {
            "train": {"text": {"unit": "characters", "min": 1, "median": 4.5, "p95": 8, "max": 8}},
            "test": {"text": {"unit": "characters", "min": 9, "median": 9.5, "p95": 10, "max": 10}},
        },
        "leaks": {"exact": 1, "near": 2, "checked": True},
        "examples": [{"where": f"x.jsonl:{i}", "row": {"text": "a" * i}} for i in (1, 2, 3)],
    }
    assert cards.card(source, splits, [], None)["leaks"] == {"exact": 0, "near": 0, "checked": False}


def test_p95_is_the_nearest_rank():
    records = [Record({"text": "a" * i}, "") for i in range(1, 101)]
    made = cards.card(Source("x", records), {"train": records}, [], None, length=lambda t: 2 * len(t), unit="tokens")
    lengths = made["lengths"]["train"]["text"]
    assert lengths == {
        "unit": "tokens",
        "min": 2,
        "median": statistics.median(range(2, 201, 2)),
        "p95": 190,
        "max": 200,
    }


def test_rows_survive_parquet(tmp_path):
    call = {"role": "assistant", "content": "ho", "name": "bot"}
    records = [
        Record({"messages": [{"role": "user", "content": "hi"}, call], "mark": 4.5, "tags": ["a"]}, "f:1"),
        Record({"messages": [{"role": "user", "content": "їжак\u2028\n"}], "mark": None, "tags": []}, "f:3"),
        Record({"messages": [{"role": "system", "content": ""}], "mark": 1.0, "tags": ["b", "c"], "late": True}, "f:9"),
    ]
    cards.write_rows(tmp_path / "train.parquet", records)
    found = cards.read_rows(tmp_path / "train.parquet")
    assert [r.where for r in found] == ["f:1", "f:3", "f:9"]
    assert [r.row["messages"] for r in found] == [r.row["messages"] for r in records]
    assert [r.row["mark"] for r in found] == [4.5, None, 1.0] and [r.row["tags"] for r in found] == [
        ["a"],
        [],
        ["b", "c"],
    ]
    assert [r.row["late"] for r in found] == [None, None, True]
    assert "_where" not in sources.read("train.parquet", base=tmp_path).records[0].row


def test_columns_have_the_kind_of_all_their_rows(tmp_path, monkeypatch):
    """Which only the last of several batches may show."""
    monkeypatch.setattr(cards, "BATCH", 2)
    values = [None, None, 1, 2, 2.5]
    made = [Record({"n": n, "who": [{"role": "user"}] if n is None else None}, f"f:{k}") for k, n in enumerate(values)]
    made.append(Record({"n": 3, "who": [{"role": "user", "name": "Ann"}], "late": "x"}, "f:5"))
    cards.write_rows(tmp_path / "x.parquet", made)
    found = [r.row for r in cards.read_rows(tmp_path / "x.parquet")]
    assert [r["n"] for r in found] == [None, None, 1.0, 2.0, 2.5, 3.0] and [r["late"] for r in found] == [None] * 5 + [
        "x"
    ]
    assert [r["who"] for r in found] == [[{"role": "user"}]] * 2 + [None] * 3 + [[{"role": "user", "name": "Ann"}]]
    assert list(pyarrow.parquet.read_schema(tmp_path / "x.parquet").names) == ["n", "who", "late", "_where"]
    with pytest.raises(DataError, match="«n»") as caught:
        cards.write_rows(tmp_path / "x.parquet", [*made, Record({"n": "four"}, "f:6")])
    assert "str (f:6)" in caught.value.where and "float (f:4)" in caught.value.where


def test_rows_that_parquet_cannot_hold(tmp_path):
    mixed = [Record({"a": 1}, "f:1"), Record({"a": "x"}, "f:2")]
    with pytest.raises(DataError) as caught:
        cards.write_rows(tmp_path / "x.parquet", mixed)
    assert "«a»" in caught.value.what and "str (f:2)" in caught.value.where
    half = [Record({"a": json.loads('"\\ud83d"')}, "f:1")]
    with pytest.raises(DataError, match="«a»"):
        cards.write_rows(tmp_path / "x.parquet", half)
    cards.write_dropped(tmp_path / "x.parquet", [(half[0], "broken")])
    (kept,) = pyarrow.parquet.read_table(tmp_path / "x.parquet").column("row").to_pylist()
    assert json.loads(kept) == half[0].row
    with pytest.raises(DataError, match=r"nothing\.parquet"):
        cards.read_rows(tmp_path / "nothing.parquet")


def test_dropped_rows_are_kept_to_look_at(tmp_path):
    record = Record({"text": "їжак", "n": float("nan"), "day": __import__("datetime").date(2026, 1, 2)}, "f:1")
    cards.write_dropped(tmp_path / "dropped.parquet", [(record, "too long")])
    (row,) = pyarrow.parquet.read_table(tmp_path / "dropped.parquet").to_pylist()
    assert (row["where"], row["reason"]) == ("f:1", "too long")
    assert json.loads(row["row"]) == {"text": "їжак", "n": None, "day": "2026-01-02"}
    cards.write_dropped(tmp_path / "dropped.parquet", [])
    assert pyarrow.parquet.read_table(tmp_path / "dropped.parquet").column_names == ["where", "reason", "row"]


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_real_questions_from_source_to_card(tmp_path):
    source = sources.read("ru_qa_koziev/qa.jsonl", base=SHARED)
    made = formats.apply(source.records, {"prompt": "{input}\n{instruction}", "completion": "{output}"}, keep=["file"])
    cleaned = clean(made, Drop(duplicates="near", longer_than=200))
    splits = split(cleaned.kept, test=500)
    assert len(splits["test"]) == 500
    found = leaks(splits)
    assert (found.exact, found.near) == (0, 0)
    described = cards.card(source, splits, cleaned.dropped, found)
    assert described["rows_out"] + sum(described["dropped"].values()) == described["rows_in"] == 8222
    cards.write_rows(tmp_path / "test.parquet", splits["test"])
    assert cards.read_rows(tmp_path / "test.parquet") == splits["test"]
