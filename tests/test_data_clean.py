"""Cleaning with its reasons, and near-duplicates against brute force."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydantic
import pytest

import temper
from temper.data import formats, near, sources
from temper.data.clean import Drop, clean
from temper.errors import DataError
from temper.runfolder import read_json
from temper.types import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"


def records(*rows: dict) -> list[Record]:
    return [Record(row, f"f:{i}") for i, row in enumerate(rows, 1)]


def texts(*values: str) -> list[Record]:
    return records(*({"text": value} for value in values))


def reasons(rows: list[Record], length=None, **drop) -> dict[str, str]:
    return {record.where: reason for record, reason in clean(rows, Drop(**drop), length=length).dropped}


def test_every_reason_is_counted():
    rows = texts("good row", " \n", "x" * 30, "a", "ends with user", "tel 123-45", "Good  ROW", "good row!")
    cleaned = clean(rows, Drop(longer_than=20, shorter_than=3, contains=["user"], matches=[r"\d{3}-\d\d"]))
    assert [(record.where, reason) for record, reason in cleaned.dropped] == [
        ("f:2", "empty"),
        ("f:3", "too long"),
        ("f:4", "too short"),
        ("f:5", "contains «user»"),
        ("f:6", r"matches «\d{3}-\d\d»"),
        ("f:7", "duplicate"),
    ]
    assert [record.where for record in cleaned.kept] == ["f:1", "f:8"]
    assert sum(cleaned.counts.values()) == 6 and cleaned.counts["duplicate"] == 1


def test_limits_are_kept_and_the_given_length_is_used():
    rows = texts("a b c", "a b", "a b c d")
    assert reasons(rows, longer_than=3, length=lambda row: len(row["text"].split())) == {"f:3": "too long"}
    assert reasons(rows, longer_than=5) == {"f:3": "too long"}
    assert reasons(rows, shorter_than=5) == {"f:2": "too short"}
    pair = records({"prompt": "abc", "completion": "de"}, {"prompt": "abc", "completion": "def"})
    assert reasons(pair, longer_than=5) == {"f:2": "too long"}


def test_blank_parts_and_equal_pairs():
    rows = records(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": ""},
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": "C", "rejected": "c"},
    )
    assert reasons(rows) == {"f:2": "empty", "f:3": "chosen equals rejected"}
    assert reasons(rows, empty=False) == {"f:3": "chosen equals rejected"}


def test_ratio():
    rows = records(*({"prompt": "x" * 10, "completion": "y" * n} for n in (1, 2, 5, 6)))
    assert reasons(rows, ratio=(0.2, 0.5)) == {"f:1": "ratio too low", "f:4": "ratio too high"}
    with pytest.raises(DataError, match="f:1"):
        reasons(texts("a"), ratio=(0.2, 0.5))


def test_duplicates_look_at_text_alone():
    same = [{"prompt": "p", "completion": "c", "id": 1}, {"completion": "c", "prompt": "p", "id": 2}]
    assert reasons(records(*same)) == {"f:2": "duplicate"}
    assert reasons(records(*same), duplicates="off") == {}
    moved = [{"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": "c"}]
    assert reasons(records(*moved)) == {}
    assert reasons(texts("one two three, four five six", "One two three four five six!"), duplicates="near") == {
        "f:2": "near duplicate"
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"matches": ["ok", "("]}, r"matches\[1\] = '\('"),
        ({"longer": 3}, "longer"),
        ({"longer_than": 3, "shorter_than": 4}, "drop every row"),
        ({"ratio": (2, 1)}, "low ≤ high"),
        ({"contains": [""]}, "every row"),
        ({"near_threshold": 0}, "near_threshold"),
    ],
)
def test_configuration_is_checked(config, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        Drop(**config)


def test_every_field_is_described():
    assert all(field.description for field in Drop.model_fields.values())


def test_nothing_left_says_why():
    with pytest.raises(DataError) as caught:
        clean(texts("", "aaaa", "aaab"), Drop(longer_than=3))
    message = str(caught.value)
    assert (
        "no row is left of 3" in message
        and "too long: 2, such as f:2 (text: 'aaaa')" in message
        and "empty: 1" in message
    )
    with pytest.raises(DataError, match="no rows"):
        clean([], Drop())


# Near-duplicates


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))}


def similarity(a: str, b: str) -> float:
    a_set, b_set = shingles(a), shingles(b)
    return len(a_set & b_set) / len(a_set | b_set)


def varied_texts(count: int, seed: int) -> list[str]:
    """Random texts, two thirds of which are earlier ones with some words changed, so that all similarities occur."""
    rng = random.Random(seed)
    vocabulary = [f"слово{i}" for i in range(400)]
    out: list[list[str]] = []
    for _ in range(count):
        if out and rng.random() < 0.67:
            words = list(rng.choice(out))
            for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
        else:
            words = [rng.choice(vocabulary) for _ in range(rng.choice([3, 8, 40, 120]))]
        out.append(words)
    return [" ".join(words) for words in out]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_brute_force(threshold, monkeypatch):
    values = varied_texts(300, seed=4)
    expected: list[int | None] = []
    for i, text in enumerate(values):
        kept = [j for j in range(i) if expected[j] is None]
        expected.append(next((j for j in kept if similarity(values[j], text) >= threshold), None))
    found = near.near_duplicates(values, threshold)
    assert found == expected
    assert 20 < sum(j is not None for j in expected) < 250
    asked = varied_texts(300, seed=4)[150:]
    expected = [next((j for j in range(150) if similarity(values[j], t) >= threshold), -1) for t in asked]
    assert near.near_matches(values[:150], asked, threshold).tolist() == expected
    monkeypatch.setattr(near, "BLOCK", 40)  # blocks of either side meet
    assert near.near_matches(iter(values[:150]), iter(asked), threshold).tolist() == expected


def test_jaccard_and_signatures_estimate_it():
    rng = np.random.default_rng(0)
    pool = np.unique(rng.integers(0, 2**63, 3000, dtype=np.uint64))
    a, b = pool[:2000], pool[500:]
    assert near.jaccard(a, b) == 1500 / len(pool) == len(set(a.tolist()) & set(b.tolist())) / len(pool)
    estimate = float((near.signature(a) == near.signature(b)).mean())
    assert abs(estimate - near.jaccard(a, b)) < 4 * (0.25 / near.K) ** 0.5
    assert (near.signature(np.tile(a, 5)) == near.signature(a)).all()  # more than one block


def test_bands_miss_little():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        b, r = near.bands(threshold)
        assert b * r <= near.K and (1 - threshold**r) ** b <= 1e-3
    assert near.bands(0.8) == (25, 5)


def test_scripts_without_spaces_have_words():
    one = "今天天气很好我们一起去公园散步吧然后去吃晚饭"
    assert near.near_duplicates([one, one[:-1] + "餐", "完全不同的一句话在这里没有相同之处"], 0.8) == [None, 0, None]
    assert near.near_duplicates(["!!! ???", "!!! ???", "...", ""], 0.8) == [None, 0, None, None]


def test_hashes_do_not_depend_on_the_process():
    code = (
        "from temper.data import near; print(near.signature(near.Shingler()('один два три чотири п’ять шість')).sum())"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(out) == 1


def test_rows_built_from_one_form_stay_fast():
    """Thousands of different rows at a similarity of about a half would meet in most buckets."""
    rng = random.Random(1)
    frame = [f"w{i}" for i in range(40)]
    values = [" ".join([*frame, *(f"x{rng.random()}" for _ in range(20))]) for _ in range(2000)]
    start = time.perf_counter()
    assert near.near_duplicates(values, 0.8) == [None] * 2000
    assert time.perf_counter() - start < 8


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_real_reviews():
    rows = formats.apply(sources.read("imdb/train.jsonl", base=SHARED, rows=2000).records, {"text": "{text}"})
    cleaned = clean(rows, Drop(longer_than=2000, contains=["<br />"]))
    assert len(cleaned.kept) + sum(cleaned.counts.values()) == 2000
    assert cleaned.counts["too long"] == sum(
        len(record.row["text"]) > 2000 and "<br />" not in record.row["text"] for record in rows
    )


# What a data stage warns of


def warned(folder: Path, lengths: list[int], **fields: object) -> list[str]:
    """The warnings of a data stage over texts of so many characters, all of them different."""
    texts = [(f"{k} " + "слово " * n)[:n] for k, n in enumerate(lengths)]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"t": t}) + "\n" for t in texts), encoding="utf-8")
    stage = {"stage": "data", "source": "rows.jsonl", "text": "{t}", "near_leaks": False, "validation": 0, "test": 0}
    recipe = {"name": "r", "stages": {"d": {**stage, "drop": {"duplicates": "off"}, **fields}}}
    (folder / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    out = temper.run(folder / "r.yaml", out=folder / "run", quiet=True)
    return read_json(out / "d" / "stage.json")["warnings"]


def test_losing_more_than_half_of_the_rows_is_told_with_their_lengths(tmp_path: Path) -> None:
    lengths = list(range(101, 202, 5))  # 21 rows: the middle one is 151, the 95th percentile the 20th, 196
    [told] = warned(tmp_path / "most", lengths, drop={"duplicates": "off", "longer_than": 150})
    assert told.startswith("11 of 21 rows are dropped (11 too long)")
    assert "151 characters long in the median, 95 % of them up to 196, and drop.longer_than is 150" in told
    assert warned(tmp_path / "half", lengths, drop={"duplicates": "off", "longer_than": 151}) == []
    told, few = warned(tmp_path / "words", lengths, drop={"duplicates": "off", "matches": ["^[0-8] ", "^1[0-9]"]})
    assert (
        told == "19 of 21 rows are dropped (10 matches «^1[0-9]», 9 matches «^[0-8] »); data/dropped.parquet has them"
    )
    assert few.startswith("train has only 2 rows (nothing held out; dropped: 10 matches")


def test_a_train_split_smaller_than_what_is_held_out_is_told(tmp_path: Path) -> None:
    many = [60] * 41
    assert warned(tmp_path / "enough", many, validation=10, test=10) == []
    [told] = warned(tmp_path / "few", many, validation=10, test=11)
    assert told.startswith("train has only 20 rows (validation 10 and test 11)")
    assert warned(tmp_path / "ten", [60] * 10) == []
    [told] = warned(tmp_path / "nine", [60] * 10, drop={"duplicates": "off", "contains": ["9 "]})
    assert told.startswith("train has only 9 rows (nothing held out; dropped: 1 contains «9 »)")
