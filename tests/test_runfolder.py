"""The run folder without a model: seals, damage, unfinished work that waits, and what kills leave between two renames."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from temper import cli
from temper.cli import runs as commands
from temper.runfolder import Result, RunFolder, progress, read_json, read_sealed, write_json, write_sealed

A, B = "a" * 64, "b" * 64
INFO: dict[str, Any] = {"name": "sft", "key": A, "config": {"lr": 1e-4}, "steps": 400, "facts": {"dtype": "float32"}}


def flip(file: Path, old: bytes, new: bytes) -> None:
    """Change one character into another that is one bit away."""
    raw = file.read_bytes()
    assert raw.count(old) == 1 and sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True)) == 1
    file.write_bytes(raw.replace(old, new))


def make(run: RunFolder, key: str = A, text: str = "weights") -> Result:
    """A finished stage `sft`."""
    folder, problem = run.begin("sft", key)
    assert problem is None
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_text(text)
    return run.commit("sft", {**INFO, "key": key})


def work(folder: Path, *steps: int) -> Path:
    """Unfinished work that has come to some checkpoints."""
    for step in steps:
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step}" / "state.json").write_text("{}")
    return folder


def aside(run: RunFolder) -> list[str]:
    return [path.name for path in run.aside()]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def reopened(run: RunFolder) -> RunFolder:
    """As another process sees it: nothing was verified yet."""
    return RunFolder(run.path)


# ── seals ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_flipped_bit_passes_a_seal(tmp_path: Path) -> None:
    """Any one bit of the file: it is refused, or says the same as before (the case of an exponent's e)."""
    file = tmp_path / "stage.json"
    write_sealed(file, {**INFO, "warnings": ["кома, «лапки»"], "seconds": 41.2, "bytes": {"size": 5, "none": None}})
    raw, before = file.read_bytes(), read_sealed(file)
    assert before is not None and before["warnings"] == ["кома, «лапки»"]
    draw, refused = random.Random(0), 0
    for at in range(len(raw)):
        bit = 1 << draw.randrange(8)
        file.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
        found = read_sealed(file)
        assert found in (None, before), (at, bit)
        refused += found is None
    assert refused > 0.95 * len(raw)


def test_what_json_changes_does_not_break_a_seal(tmp_path: Path) -> None:
    write_sealed(tmp_path / "f", {"tuple": (1, 2), "ids": {10: "x", 9: "y"}})
    assert read_sealed(tmp_path / "f") == {"tuple": [1, 2], "ids": {"10": "x", "9": "y"}}
    assert list(read_json(tmp_path / "f"))[-1] == "sha256"


@pytest.mark.parametrize("text", ["", "[]", "null", '"sha256"', "{}", '{"key": "a"}', '{"sha256": 1}', "\xff"])
def test_what_is_no_sealed_dictionary_is_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text, encoding="latin-1")
    assert read_sealed(tmp_path / "f") is None


@pytest.mark.parametrize(
    ("old", "new"), [(b'"steps": 400', b'"steps": 410'), (b"float32", b"float12"), (b'"bytes": 7', b'"bytes": 3')]
)
def test_a_flipped_bit_in_stage_json_is_damage(run: RunFolder, old: bytes, new: bytes) -> None:
    made = make(run)
    flip(made.path / "stage.json", old, new)
    found, problem = reopened(run).find("sft", A)
    assert found is None and problem and "stage.json" in problem and "it runs again" in problem
    assert aside(run) == ["sft@damaged"] and not made.path.exists()
    assert reopened(run).recorded("sft", A) is None
    assert make(reopened(run)).path == made.path  # and its name is free


def test_a_damaged_result_that_was_set_aside_is_not_taken_back(run: RunFolder) -> None:
    make(run)
    make(run, B)
    assert aside(run) == [f"sft@{A[:8]}"]
    flip(run.path / f"sft@{A[:8]}" / "stage.json", b'"steps": 400', b'"steps": 410')
    found, problem = reopened(run).find("sft", A)
    assert found is None and problem and aside(run) == ["sft@damaged"]
    found, problem = reopened(run).find("sft", B)
    assert found and problem is None


def test_another_copy_takes_the_place_of_a_damaged_one(run: RunFolder) -> None:
    made = make(run)
    shutil.copytree(made.path, run.path / f"sft@{A[:8]}-2")
    (made.path / "model" / "model.safetensors").write_text("weighty")
    found, problem = reopened(run).find("sft", A)
    assert found and found.path == made.path and problem and "another copy takes its place" in problem
    assert (made.path / "model" / "model.safetensors").read_text() == "weights"
    assert aside(run) == ["sft@damaged"]


# ── unfinished work ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_unfinished_work_with_a_damaged_mark_is_kept_and_told(run: RunFolder, damage: str) -> None:
    folder = work(run.begin("sft", A)[0], 400)
    mark = folder / "partial.json"
    if damage == "gone":
        mark.unlink()
    elif damage == "cut":
        os.truncate(mark, 10)
    else:
        mark.write_bytes(mark.read_bytes().replace(b"aaaa", b"aaac", 1))  # still a key, and not that of the work
    folder, problem = run.begin("sft", A)
    assert problem and "partial.json" in problem and "sft.partial@damaged" in problem
    assert progress(folder) == (0, 0)
    assert progress(run.path / "sft.partial@damaged") == (400, 0)


def test_a_folder_without_work_is_no_matter(run: RunFolder) -> None:
    """Killed before its mark was written."""
    (run.path / "sft.partial").mkdir()
    (run.path / "sft.partial" / ".partial.json.123.tmp").write_text('{"k')
    assert run.begin("sft", A) == (run.path / "sft.partial", None)
    assert aside(run) == []


def test_the_work_that_came_furthest_goes_on(run: RunFolder) -> None:
    for name, steps in (("sft.partial@aaaaaaaa", [5]), ("sft.partial@aaaaaaaa-2", [5, 40]), ("sft.partial", [7])):
        folder = work(run.path / name, *steps)
        write_sealed(folder / "partial.json", {"key": A})
    write_sealed(work(run.path / "sft.partial@bbbbbbbb", 99) / "partial.json", {"key": B})
    folder, problem = run.begin("sft", A)
    assert problem is None and progress(folder) == (40, 0)
    assert sorted(progress(p)[0] for p in run.aside()) == [5, 7, 99]  # nothing is lost either
    assert progress(run.begin("sft", B)[0]) == (99, 0)
    assert progress(run.begin("sft", A)[0]) == (40, 0)


def test_progress_counts_steps_as_numbers(tmp_path: Path) -> None:
    work(tmp_path, 9, 10)
    (tmp_path / "checkpoints" / ".step-11.tmp").mkdir()
    (tmp_path / "checkpoints" / "best-12").mkdir()
    assert progress(tmp_path) == (10, 0)
    assert progress(tmp_path / "absent") == (0, 0)


def test_forced_anew_nothing_of_the_old_work_goes_on(run: RunFolder) -> None:
    """Not even what was set aside under the same settings; that of other settings stays."""
    work(run.begin("sft", A)[0], 3)
    work(run.begin("sft", B)[0], 4)
    run.discard("sft", A)
    assert progress(run.begin("sft", A)[0]) == (0, 0)
    assert progress(run.begin("sft", B)[0]) == (4, 0)


def test_a_deletion_cut_short_is_finished_by_the_next_start(run: RunFolder) -> None:
    (run.path / ".sft.partial.deleted.tmp" / "checkpoints").mkdir(parents=True)
    (run.path / ".manifest.json.77.tmp").write_text("{")
    with run.locked():
        assert sorted(p.name for p in run.path.iterdir()) == [".lock"]


def test_finished_but_not_yet_named_and_then_other_settings(run: RunFolder) -> None:
    """Killed right before the last rename, run under other settings, and back: the work was done and is found."""
    made = make(run)
    os.rename(made.path, run.partial("sft"))
    write_sealed(run.partial("sft") / "partial.json", {"key": A})
    run.begin("sft", B)
    assert aside(run) == [f"sft.partial@{A[:8]}"]
    found, problem = reopened(run).find("sft", A)
    assert found and problem is None and (found.path / "model").is_dir() and found.path.name == "sft"


# ── what is said ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("steps", "answers", "said"),
    [
        ((), 0, "the same command begins stage sft anew; finished stages stay"),
        ((2, 10), 0, "the same command goes on from step 10 of stage sft"),
        ((), 2, "the same command goes on with stage sft; the answers of 2 of its models are kept"),
    ],
)
def test_a_stop_says_from_where_the_command_goes_on(
    run: RunFolder, steps: tuple[int, ...], answers: int, said: str
) -> None:
    write_json(run.path / "manifest.json", {"stages": [{"name": "sft", "status": "failed"}]})
    folder = work(run.begin("sft", A)[0], *steps)
    (folder / "answers").mkdir()
    for k in range(answers):
        write_sealed(folder / "answers" / f"{k}.json", {})
    assert commands._stopped_at([run.path]) == said


def test_a_manifest_that_is_no_manifest_stops_nothing(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text("[1]")
    words = ["run", "detox-summarization", "--profile", "smoke", "--set", "threads=1", "--stages", "corpus"]
    assert cli.main([*words, "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"][0]["cached"] is True
