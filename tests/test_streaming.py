"""Streams: every row once an epoch wherever it lies, the same examples after a kill and on two processes, what is held out held out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from hubbed import Sets, sets_served
from staged_runs import ENVIRONMENT
from temper import app
from temper import recipe as recipes
from temper.data.stream import Shards, shards
from temper.engine.chains import Chains
from temper.engine.streaming import Block, Streaming
from temper.errors import DataError, RecipeError, TemperError
from temper.runfolder import read_json
from temper.stages.seen import fingerprint
from temper.types import Record
from temper.world import World

ROWS, GROUP = 1900, 300  # of all files together; of a row group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files; one row in nine is blank, and some ask the same."""
    made = tmp_path_factory.mktemp("streamed") / "data"
    made.mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for k in range(ROWS):
        a, b = draw.integers(0, 60, 2).tolist()
        rows.append({"asked": f"скільки {a} і {b}?", "said": "" if k % 9 == 4 else f"разом {a + b}", "number": k, "unread": "x" * 30})
    for k, cut in enumerate((slice(0, 700), slice(700, 1000), slice(1000, ROWS))):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[cut]), made / f"part-{k}.parquet", row_group_size=GROUP)
    return made


def opened(folder: Path, **how: Any) -> Shards:
    return shards(str(folder), config=None, split=None, revision=None, base=folder, columns=how.get("columns"))[0]


@pytest.mark.parametrize("window", [1, 7, 250, 299, 5000])
def test_blocks_of_an_epoch_hold_every_row_once(folder: Path, window: int) -> None:
    every = [row for k in range(3) for row in pyarrow.parquet.read_table(folder / f"part-{k}.parquet").to_pylist()]
    source = opened(folder)
    found = []
    for start in range(0, ROWS, window):
        block = list(source.read(source.spans(3, 1, start, min(start + window, ROWS))))
        assert len(block) == min(window, ROWS - start)
        found += block
    assert [n for n, _ in found] != list(range(ROWS)) and sorted(n for n, _ in found) == list(range(ROWS))
    assert all(record.row == every[n] for n, record in found)
    assert all(record.where.startswith("part-") and record.row["number"] == n for n, record in found)
    n, record = found[0]
    name, line = record.where.split(":")
    assert pyarrow.parquet.read_table(folder / name).to_pylist()[int(line) - 1] == every[n]


def test_what_comes_in_the_middle_needs_nothing_before(folder: Path) -> None:
    source = opened(folder)
    whole = [n for n, _ in source.read(source.spans(0, 0, 0, ROWS))]
    for start, stop in ((1234, 1300), (1300, 1301), (50, 900), (0, 3)):  # on, on, and back
        assert [n for n, _ in source.read(source.spans(0, 0, start, stop))] == whole[start:stop]
    assert whole != [n for n, _ in source.read(source.spans(0, 1, 0, ROWS))]
    assert whole != [n for n, _ in source.read(source.spans(1, 0, 0, ROWS))]


def test_only_columns_that_are_asked_for_are_read(folder: Path) -> None:
    source = opened(folder, columns=["said"])
    assert next(source.read(source.spans(0, 0, 0, 1)))[1].row.keys() == {"said"}
    with pytest.raises(DataError, match="no column «sad»"):
        opened(folder, columns=["sad"])


def test_a_file_that_changes_is_another(folder: Path, tmp_path: Path) -> None:
    """Its content is not read for that, only what describes it: an extreme of a column, a size."""
    table = pyarrow.table({"n": [1, 2, 3]})
    seen = set()
    for changed in (table, pyarrow.table({"n": [1, 2, 4]}), pyarrow.table({"n": [1, 2]})):
        pyarrow.parquet.write_table(changed, tmp_path / "a.parquet")
        seen.add(opened(tmp_path).sha256)
    assert len(seen) == 3


def blocks_of(asked: list[int], sizes: list[int]) -> Any:
    """Blocks of examples whose first token says which they are."""

    def made(number: int) -> Block:
        asked.append(number)
        size, first = sizes[number % len(sizes)], sum(sizes[k % len(sizes)] for k in range(number))
        chains = Chains(([first + k, 1, 2], [False, True, True], str(first + k)) for k in range(size))
        return Block(chains, np.arange(first, first + size, dtype=np.uint64), Counter({"blank": 1}))

    return made


def streaming(folder: Path, asked: list[int], sizes: list[int]) -> Streaming:
    made = blocks_of(asked, sizes)
    return Streaming(made, rows=sum(sizes), blocks=len(sizes), size=4, row_tokens=64, micro_tokens=64, seed=1, folder=folder, world=World())


def examples(batches: Streaming, steps: range) -> list[list[str]]:
    return [sorted(t.origin for row in batches.rows(s) for t in row.trees) for s in steps]


def test_steps_take_every_example_once_and_go_on_without_what_came_before(tmp_path: Path) -> None:
    sizes = [10, 0, 3, 8]
    asked: list[int] = []
    batches = streaming(tmp_path / "stream", asked, sizes)
    taken = examples(batches, range(20))
    assert sorted(int(o) for step in taken for o in step)[:63] == list(range(63))  # three epochs of 21, but for the last window
    assert [len(step) for step in taken] == [4] * 20 and asked == sorted(asked)
    assert batches.gone["blank"] == len(set(asked))
    again: list[int] = []
    after = streaming(tmp_path / "stream", again, sizes)
    assert examples(after, range(13, 20)) == taken[13:]
    assert min(again) >= 8  # not the blocks before
    assert after.seen.tolist() == batches.seen.tolist() == list(range(len(batches.seen)))


def test_a_note_that_a_kill_cut_is_made_again(tmp_path: Path) -> None:
    sizes = [10, 5, 6]
    first = streaming(tmp_path / "stream", [], sizes)
    taken = examples(first, range(15))
    index, marks = tmp_path / "stream" / "blocks.jsonl", tmp_path / "stream" / "marks"
    for harm in ("line", "marks", "both"):
        if harm != "marks":
            os.truncate(index, index.stat().st_size - 9)
        if harm != "line":
            os.truncate(marks, marks.stat().st_size // 2 - 3)
        after = streaming(tmp_path / "stream", [], sizes)
        assert examples(after, range(15)) == taken, harm
        assert after.seen.tolist() == first.seen.tolist() and after.gone == first.gone


def test_a_stream_of_nothing_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of the stream is left .*blank"):
        streaming(tmp_path / "stream", [], [0, 0]).rows(0)


RECIPE = """
name: streamed
model: {model}
threads: 1
stages:
  qa: {{stage: data, source: {data}, prompt: "{{asked}}", completion: "{{said}}", keep: [number], stream: {{window: 250}}, validation: 20, test: 30}}
  sft: {{stage: sft, data: qa, adapter: {{method: lora, r: 4}}, batch_size: 8, max_steps: 150, checkpoint_every: 10, lr: 1.0e-2, optimizer: sgd, samples: 0, merge: true}}
"""


def command(folder: Path, out: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "temper", "run", str(folder / "r.yaml"), "--out", str(folder / out), *more]


def run(folder: Path, out: str, *more: str, **environment: str) -> str:
    done = subprocess.run(command(folder, out, *more), env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tiny_model: Path) -> Path:
    home = folder.parent
    (home / "r.yaml").write_text(RECIPE.format(model=tiny_model, data=folder), encoding="utf-8")
    run(home, "one")
    return home


def weights(folder: Path) -> dict[str, Any]:
    return load_file(next((folder / "sft" / "model").glob("*.safetensors")))


def test_what_is_held_out_is_not_trained_on(undisturbed: Path, folder: Path) -> None:
    """Nor what asks the same; blank rows are counted. Two thirds of an epoch of 1,900 rows are read."""
    stage, card = undisturbed / "one" / "sft", read_json(undisturbed / "one" / "qa" / "card.json")
    every = [row for k in range(3) for row in pyarrow.parquet.read_table(folder / f"part-{k}.parquet").to_pylist()]
    held = [row for n in ("validation", "test") for row in pyarrow.parquet.read_table(undisturbed / f"one/qa/data/{n}.parquet").to_pylist()]
    assert card["splits"] == {"train": ROWS - 50, "validation": 20, "test": 30} and len({r["number"] for r in held}) == 50
    assert len({r["number"] // GROUP for r in held}) > 3  # from more than one place
    mark = {row["asked"]: fingerprint(Record({"prompt": row["asked"], "completion": "x"}, "")) for row in every}
    trained = set(np.load(stage / "trained_on.npy").tolist())
    asked = {row["prompt"] for row in held}
    assert not trained & {mark[q] for q in asked}
    seen = [row for row in every if mark[row["asked"]] in trained]
    assert len(seen) > 1000
    gone = read_json(stage / "stage.json")["facts"]["rows of the stream"]
    assert "empty" in gone and "asks the same as a row held out" in gone
    assert not (stage / "stream").exists()


def test_a_killed_run_goes_on_in_the_middle(undisturbed: Path) -> None:
    process = subprocess.Popen(command(undisturbed, "killed"), env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL)
    while not list((undisturbed / "killed").glob("sft.partial/checkpoints/step-[4-9]0")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = run(undisturbed, "killed")
    assert "goes on from step" in said and "goes on from step 0" not in said
    one, two = weights(undisturbed / "one"), weights(undisturbed / "killed")
    assert all(bool((two[n] == x).all()) for n, x in one.items())
    lines = [[json.loads(t)["loss"] for t in (undisturbed / out / "sft" / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(t)] for out in ("one", "killed")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 150
    trained = [np.load(undisturbed / out / "sft" / "trained_on.npy").tolist() for out in ("one", "killed")]
    assert trained[0] == trained[1]


def test_two_processes_take_the_same_steps(undisturbed: Path) -> None:
    """Each reads and encodes half of every window."""
    run(undisturbed, "two", "--set", "launch.processes=2")
    one, two = weights(undisturbed / "one"), weights(undisturbed / "two")
    assert all(float((two[n] - x).norm() / x.norm()) < 1e-6 for n, x in one.items())
    facts = [read_json(undisturbed / out / "sft" / "stage.json")["facts"]["rows of the stream"] for out in ("one", "two")]
    assert facts[0] == facts[1]


def test_a_hub_data_set_is_read_where_it_lies(undisturbed: Path, folder: Path, tmp_path: Path) -> None:
    """Over the hub's HTTP: the same weights as of local files, and nothing is downloaded whole."""
    with sets_served(folder) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run(undisturbed, "hub", "--set", "qa.source=me/sums", **hub)
        names = Counter(name for name, _ in Sets.parts)
    one, two = weights(undisturbed / "one"), weights(undisturbed / "hub")
    assert all(bool((two[n] == x).all()) for n, x in one.items())
    assert set(names) == {f"part-{k}.parquet" for k in range(3)}
    assert read_json(undisturbed / "hub" / "qa" / "card.json")["revision"] == Sets.commit
    assert not [p for p in (tmp_path / "home").rglob("*.parquet")]


def test_a_plan_looks_at_a_stream_without_reading_it(undisturbed: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "temper", "plan", str(undisturbed / "r.yaml"), "--out", str(undisturbed / "new")], env={**os.environ, **ENVIRONMENT, "COLUMNS": "200"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stops" not in done.stdout


def test_what_reads_a_stream_is_known_beforehand(folder: Path, tmp_path: Path) -> None:
    more = {
        "p: {stage: preference, data: qa}": True, "c: {stage: classifier, data: qa}": True, "e: {stage: evaluate, data: qa.train, models: [sft]}": True,
        "g: {stage: generate, data: qa, model: sft, instruction: x, into: y, text: '{y}'}": True, "e: {stage: evaluate, data: qa, models: [sft]}": False,
        "g: {stage: generate, data: qa, model: sft, instruction: x, into: y, text: '{y}', splits: [test]}": False,
    }  # fmt: skip
    for line, refused in more.items():
        (tmp_path / "r.yaml").write_text(RECIPE.format(model="tiny", data=folder) + f"  {line}\n", encoding="utf-8")
        if not refused:
            recipes.load(str(tmp_path / "r.yaml"))
            continue
        with pytest.raises(RecipeError, match="«qa» is a stream") as raised:
            recipes.load(str(tmp_path / "r.yaml"))
        assert "r.yaml:8" in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("drop: {duplicates: exact}", "drop.duplicates takes all rows at once"),
        ("best: {by: number}", "best takes all rows"),
        ("take: 10", "take takes all rows"),
        ("group: number", "group takes all rows"),
        ("validation: 0.1", "of a stream validation is a number of rows"),
        ("test: other", "of a stream test is a number of rows"),
    ],
)
def test_what_takes_all_rows_is_refused(folder: Path, tmp_path: Path, wrong: str, told: str) -> None:
    text = RECIPE.format(model="tiny", data=folder).replace("validation: 20, test: 30", wrong)
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(TemperError) as raised:
        recipes.load(str(tmp_path / "r.yaml"))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("stage: sft, data: qa,", "stage: sft, data: qa, take: 5,", "take picks among all rows"),
        ("source: {data},", "source: mini:uk-news,", "there is nothing to stream"),
        ("validation: 20", "validation: 5000", "are to be held out"),
        ('"{{said}}"', '"{{sad}}"', "no column «sad»"),
        ("stage: sft, data: qa, adapter: {{method: lora, r: 4}}, batch_size: 8,", "stage: preference, data: qa, batch_size: 8,", "«qa» is a stream"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot_give_is_told(folder: Path, tmp_path: Path, tiny_model: Path, before: str, after: str, told: str) -> None:
    assert before in RECIPE
    text = RECIPE.replace(before, after).replace(", samples: 0" if "preference" in after else "\0", "")
    (tmp_path / "r.yaml").write_text(text.format(model=tiny_model, data=folder), encoding="utf-8")
    with pytest.raises((DataError, RecipeError)) as raised:
        app.execute(recipes.load(str(tmp_path / "r.yaml")), tmp_path / "run", quiet=True)
    assert told in str(raised.value), str(raised.value)


def test_a_large_row_group_is_not_held(tmp_path: Path) -> None:
    """40 MB in one group, read in windows that end in the middle of what is read at once."""
    rows = [{"text": f"{k} " + "слово " * 90} for k in range(40_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10**6, use_dictionary=False)
    source, before, most = opened(tmp_path), pyarrow.total_allocated_bytes(), 0
    for start in range(0, 40_000, 1500):
        for _ in source.read(source.spans(0, 0, start, start + 1500)):
            pass
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8e6
