"""What disks do: files damaged after they were written, disks that fill up, two runs in one folder, old results.

Whatever happened, it is told, nothing half-written stands under a final name, and the run ends with the same weights.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from staged_runs import Workshop, copy_stages, lines_of, weights, whole_stages
from temper.runfolder import RunFolder, damage, read_json

SFT = {"checkpoint_every": 2, "evaluate_every": 2, "samples": 0}
GIVEN = ("corpus", "tiny", "news")
TRAIN: dict[str, Any] = {"overrides": {"stages": {"sft": SFT}}, "only": ["sft"]}


@pytest.fixture(scope="module")
def untroubled(forks: Workshop, smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on a disk that behaves."""
    folder = copy_stages(smoke_run, tmp_path_factory.mktemp("untroubled") / "run", *GIVEN)
    assert forks.run(folder, **TRAIN)["status"] == 0
    return folder


def flip(file: Path, at: float = 0.5) -> None:
    """Change one bit."""
    raw = bytearray(file.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def log_of(folder: Path) -> str:
    return (folder / "pipeline.log").read_text(encoding="utf-8")


def whole_checkpoints(folder: Path) -> list[str]:
    """Names of a stage's checkpoints, every one of them complete."""
    found = [p for p in sorted(folder.glob("*.partial/checkpoints/*")) if not p.name.startswith(".")]
    for path in found:
        assert damage(path, read_json(path / "checksums.json")) is None
    return [p.name for p in found]


def test_damage_to_finished_stages_is_noticed_and_made_good(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run")
    cut(folder / "tiny" / "model" / "model.safetensors")
    flip(folder / "news" / "data" / "train.parquet")
    flip(folder / "judge" / "model" / "model.safetensors", at=0.9)
    flip(folder / "toxic_news" / "data" / "test.parquet")
    cut(folder / "sft" / "stage.json")
    (folder / "grpo" / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "compare" / "rows.parquet").unlink()
    ended = forks.run(folder, {})
    assert ended["status"] == 0, ended["traceback"]
    told = [line for line in log_of(folder).splitlines() if "warning: stage" in line]
    damaged = {
        "tiny": "model/model.safetensors has",
        "news": "data/train.parquet differs",
        "judge": "model/model.safetensors differs",
        "toxic_news": "data/test.parquet differs",
        "sft": "stage.json",
        "grpo": "adapter/adapter_model.safetensors is missing",
        "compare": "rows.parquet is missing",
    }
    for name, what in damaged.items():
        assert [line for line in told if f"stage {name} " in line and what in line], (name, told)
    assert weights(folder) == weights(smoke_run)
    stages = {s["name"]: s["cached"] for s in read_json(folder / "manifest.json")["stages"]}
    assert len(stages) == 13 and stages == {name: name not in damaged for name in stages}


def test_one_flipped_bit_in_the_weights(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """The size is right, the file loads, and every number in it but one is what it was."""
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN, "sft")
    flip(folder / "sft" / "model" / "model.safetensors", at=0.9)
    assert forks.run(folder, {}, only=["sft"])["status"] == 0
    assert "model/model.safetensors differs from what was written" in log_of(folder)
    assert weights(folder)["sft/model/model.safetensors"] == weights(smoke_run)["sft/model/model.safetensors"]


@pytest.mark.parametrize("file", ["optimizer.safetensors", "trainable.safetensors", "state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_gone_behind(
    forks: Workshop, smoke_run: Path, untroubled: Path, tmp_path: Path, file: str
) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN)
    ended = forks.run(folder, die_at="step 7 in sft.partial/metrics.jsonl", **TRAIN)
    assert ended["status"] == -signal.SIGKILL
    (flip if file.startswith("optimizer") else cut)(folder / "sft.partial" / "checkpoints" / "step-6" / file)
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    assert any("checkpoint step-6 is damaged" in w for w in read_json(folder / "sft" / "stage.json")["warnings"])
    assert "goes on from step 4" in log_of(folder)
    assert weights(folder) == weights(untroubled)
    assert lines_of(folder / "sft" / "metrics.jsonl") == lines_of(untroubled / "sft" / "metrics.jsonl")


def test_damaged_best_weights_are_not_kept_as_best(
    forks: Workshop, smoke_run: Path, untroubled: Path, tmp_path: Path
) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN)
    assert forks.run(folder, die_at="step 7 in sft.partial/metrics.jsonl", **TRAIN)["status"] == -signal.SIGKILL
    (best,) = (folder / "sft.partial" / "checkpoints").glob("best-*")
    flip(best / "trainable.safetensors")
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    assert any("best weights" in w for w in read_json(folder / "sft" / "stage.json")["warnings"])
    assert weights(folder) == weights(untroubled)


def test_where_every_checkpoint_is_torn_the_stage_begins_anew_and_says_what_it_left_out(
    forks: Workshop, smoke_run: Path, untroubled: Path, tmp_path: Path
) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN)
    assert forks.run(folder, die_at="step 7 in sft.partial/metrics.jsonl", **TRAIN)["status"] == -signal.SIGKILL
    root = folder / "sft.partial" / "checkpoints"
    for found in root.glob("*-*"):
        cut(found / "trainable.safetensors")
    (root / ".step-8.tmp").mkdir()  # half of one that was being written
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    told = read_json(folder / "sft" / "stage.json")["warnings"]
    assert [n for n in (4, 6) if any(f"checkpoint step-{n} is damaged" in w for w in told)] == [4, 6]
    assert any("training begins again, at step 0" in w for w in told)
    assert "left out: a half-written checkpoint (step-8)" in log_of(folder)
    assert "goes on from step" not in log_of(folder).rsplit("left out", 1)[1]
    assert weights(folder) == weights(untroubled)
    assert lines_of(folder / "sft" / "metrics.jsonl") == lines_of(untroubled / "sft" / "metrics.jsonl")
    assert lines_of(folder / "sft" / "worst.jsonl") == lines_of(untroubled / "sft" / "worst.jsonl") != []


def test_a_damaged_mark_costs_the_work_and_is_told(
    forks: Workshop, smoke_run: Path, untroubled: Path, tmp_path: Path
) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN)
    assert forks.run(folder, die_at="step 7 in sft.partial/metrics.jsonl", **TRAIN)["status"] == -signal.SIGKILL
    flip(folder / "sft.partial" / "partial.json", at=0.3)
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    assert [w for w in read_json(folder / "sft" / "stage.json")["warnings"] if "partial.json is damaged" in w]
    assert "set aside earlier: 1, " in log_of(folder) and f"temper prune {folder}" in log_of(folder)
    assert (folder / "sft.partial@damaged" / "checkpoints" / "step-6").is_dir()
    assert weights(folder) == weights(untroubled)


def test_a_damaged_answer_is_asked_again(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """One letter of an answer: the file reads well, and its scores would be wrong."""
    folder = copy_stages(smoke_run, tmp_path / "run", but=["compare"])
    assert forks.run(folder, {}, die_at="before compare.partial/evaluation.json")["status"] == -signal.SIGKILL
    kept = sorted((folder / "compare.partial" / "answers").glob("*.json"))
    found = read_json(kept[0])
    found["outputs"]["predictions"][0] += "а"
    kept[0].write_text(json.dumps(found), encoding="utf-8")
    ended = forks.run(folder, {})
    assert ended["status"] == 0, ended["traceback"]
    told = read_json(folder / "compare" / "stage.json")["warnings"]
    assert len([w for w in told if "that were kept are damaged" in w]) == 1 and len(kept) == 3
    assert weights(folder) == weights(smoke_run)


@pytest.mark.parametrize(
    ("limit", "where"),
    [(1_000, "the recipe"), (100_000, "best weights"), (250_000, "the optimiser's state"), (500_000, "the model")],
)
def test_a_limit_on_file_size_while_training(
    forks: Workshop, smoke_run: Path, untroubled: Path, tmp_path: Path, limit: int, where: str
) -> None:
    """As a full disk, at each kind of file; the last good checkpoint stays and is gone on from."""
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN)
    assert forks.run(folder, die_at="step 5 in sft.partial/metrics.jsonl", **TRAIN)["status"] == -signal.SIGKILL
    ended = forks.run(folder, file_limit=limit, **TRAIN)
    assert ended["status"] == 1
    assert ended["error"] and ended["error"]["type"] == "RunError" and "disk" in ended["error"]["text"]
    assert not (folder / "sft").exists()
    whole_stages(folder)
    assert "step-4" in whole_checkpoints(folder) or "step-8" in whole_checkpoints(folder)
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    assert "goes on from step" in log_of(folder).rsplit("── sft", 1)[1]
    assert weights(folder) == weights(untroubled)


@pytest.mark.parametrize(("limit", "where"), [(40_000, "rows as parquet"), (70_000, "the tokenizer")])
def test_a_limit_on_file_size_before_training(
    forks: Workshop, smoke_run: Path, tmp_path: Path, limit: int, where: str
) -> None:
    folder = tmp_path / "run"
    ended = forks.run(folder, {}, only=["tiny"], file_limit=limit)
    assert ended["status"] == 1
    assert ended["error"] and ended["error"]["type"] == "RunError" and "disk" in ended["error"]["text"], ended
    whole_stages(folder)
    ended = forks.run(folder, {}, only=["tiny"])
    assert ended["status"] == 0, ended["traceback"]
    assert weights(folder)["tiny/model/model.safetensors"] == weights(smoke_run)["tiny/model/model.safetensors"]


def test_numpy_tells_a_full_disk_in_words_of_its_own(tmp_path: Path) -> None:
    """It raises an OSError without a number: «4096 requested and 234 written»."""
    script = """
import resource, sys, pathlib, numpy
from temper.errors import RunError
from temper.pipeline import disk_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
folder = pathlib.Path(sys.argv[1])
try:
    with disk_errors(folder):
        numpy.save(folder / "array.npy", numpy.zeros(4096))
except RunError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "the disk is full" in ended.stdout, ended.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here (it needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(forks: Workshop, smoke_run: Path, untroubled: Path, small_disk: Path) -> None:
    folder = copy_stages(smoke_run, small_disk / "run", *GIVEN)
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 1
    assert ended["error"] and ended["error"]["type"] == "RunError" and "disk is full" in ended["error"]["text"], ended
    assert not (folder / "sft").exists()
    whole_stages(folder)
    whole_checkpoints(folder)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    ended = forks.run(folder, **TRAIN)
    assert ended["status"] == 0, ended["traceback"]
    assert weights(folder) == weights(untroubled)


def test_a_disk_without_any_room(forks: Workshop, smoke_run: Path, small_disk: Path) -> None:
    """Not even the recipe can be written; what is there stays readable."""
    folder = copy_stages(smoke_run, small_disk / "run", "corpus")
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 16))
    ended = forks.run(folder, {})
    assert ended["error"] and ended["error"]["type"] == "RunError" and "disk is full" in ended["error"]["text"], ended
    whole_stages(folder)


def test_two_processes_in_one_run_folder(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run")
    with RunFolder(folder).locked():
        ended = forks.run(folder, {})
    assert ended["status"] == 1
    assert ended["error"] and ended["error"]["type"] == "RunError" and "another process" in ended["error"]["text"]
    assert forks.run(folder, {})["status"] == 0


def test_other_settings_set_results_aside_and_the_old_ones_take_them_back(
    forks: Workshop, smoke_run: Path, tmp_path: Path
) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", *GIVEN, "sft")
    before = weights(folder)
    old = read_json(folder / "sft" / "stage.json")["key"]
    other: dict[str, Any] = {"overrides": {"stages": {"sft": {"lr": 1e-3, "max_steps": 4, **SFT}}}, "only": ["sft"]}
    # under other settings, and killed in the middle: nothing that was there is touched
    assert forks.run(folder, die_at="step 3 in sft.partial/metrics.jsonl", **other)["status"] == -signal.SIGKILL
    assert weights(folder) == before
    # back, while the other work waits
    ended = forks.run(folder, {}, only=["sft"])
    assert ended["status"] == 0 and not any("step" in m for m in ended["moments"])
    # and on with the other
    assert forks.run(folder, **other)["status"] == 0
    assert "goes on from step 2" in log_of(folder)
    assert read_json(folder / f"sft@{old[:8]}" / "stage.json")["key"] == old
    assert weights(folder) != before
    ended = forks.run(folder, {}, only=["sft"])
    assert ended["status"] == 0 and not any("step" in m for m in ended["moments"])
    assert weights(folder) == before
    assert read_json(folder / "manifest.json")["stages"][3]["cached"] is True
