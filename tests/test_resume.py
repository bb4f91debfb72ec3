"""Killed at any moment, a run ends as one that was never killed: bit for bit, every step once.

`kill -9` comes from within at named moments (between the writes and renames of a checkpoint or a stage) and from
outside at random ones.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from staged_runs import ENVIRONMENT, Workshop, copy_stages, lines_of, weights, whole_stages
from temper.engine.loop import append, forget_after
from temper.runfolder import read_json

SFT = {
    "adapter": {"dropout": 0.1}, "batch_size": 4, "accumulation": 2, "precision": "bf16", "warmup": 0,
    "schedule": "constant", "max_steps": 8, "evaluate_every": 2, "checkpoint_every": 2, "patience": 1, "samples": 0,
}  # fmt: skip


def same(folder: Path, reference: Path) -> None:
    """Everything that the clock does not decide is equal in two run folders."""
    assert weights(folder) == weights(reference)
    for stage in (p.parent for p in sorted(reference.glob("*/stage.json")) if "@" not in p.parent.name):
        ours = folder / stage.name
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert lines_of(ours / name) == lines_of(stage / name)
        mine, other = read_json(ours / "stage.json"), read_json(stage / "stage.json")
        assert set(mine["files"]) == set(other["files"])
        for key in set(other) - {"files", "seconds", "peak_memory_bytes", "bytes_on_disk", "summary", "sha256"}:
            assert mine[key] == other[key], f"{stage.name}: {key}"


def die_at_each(forks: Workshop, moments: list[str], start: Callable[[str], Path], unkilled: Path, **how: Any) -> int:
    """One run killed at the first of the moments, started again and killed at the next, …, and at last finished.

    A start that comes to its end because its moment does not return (that work is done) goes on afresh. Every end is
    compared with the run that nobody killed. Returns how many starts were killed.
    """
    folder, died = start("0"), 0
    for k, moment in enumerate([*moments, None]):
        ended = forks.run(folder, die_at=moment, **how)
        whole_stages(folder)
        if ended["status"] == -signal.SIGKILL:
            died += 1
            continue
        assert ended["status"] == 0, f"{moment}: {ended['traceback']}"
        same(folder, unkilled)
        folder = start(str(k + 1))
    return died


def reference(forks: Workshop, folder: Path, **how: Any) -> list[str]:
    """A run that nobody kills; the last of each kind of moment, without those that differ from a neighbour by nothing."""
    ended = forks.run(folder, **how)
    assert ended["status"] == 0, ended["traceback"]
    alike = re.compile(r"after .*\.(json|yaml)|.* report/.*|.* recipe.yaml|.* manifest.json")
    kinds = {re.sub(r"\d+", "#", m): m for m in ended["moments"] if not alike.fullmatch(m)}
    return sorted(kinds.values(), key=ended["moments"].index)


def started(smoke_run: Path, tmp_path: Path, *stages: str) -> Callable[[str], Path]:
    return lambda name: copy_stages(smoke_run, tmp_path / name, *stages)


def test_sft_dies_at_every_moment(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Dropout, accumulation, bf16, the best weights kept, early stopping; an older result to be set aside."""
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news", "sft")
    for lr in (0.2, 0.1, 1.0, 0.3, 0.25, 0.15, 0.05, 0.03, 0.025, 0.02, 0.01):
        how: dict[str, Any] = {"overrides": {"stages": {"sft": {**SFT, "lr": lr}}}, "only": ["sft"]}
        unkilled = start(f"unkilled-{lr}")
        moments = reference(forks, unkilled, **how)
        lines = lines_of(unkilled / "sft" / "metrics.jsonl")
        steps, best = [x["step"] for x in lines if "loss" in x], [x["step"] for x in lines if x.get("best")]
        assert steps == list(range(1, len(steps) + 1))
        if 2 < best[-1] < len(steps) < SFT["max_steps"]:
            break
    else:
        pytest.fail("no learning rate makes validation improve and then stop the run early; try others")
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 20


def test_pretraining_dies_at_every_moment(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """The tokenizer is part of the work: half of it must not be taken for the whole."""
    tiny = {"max_steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
    how: dict[str, Any] = {"overrides": {"stages": {"tiny": tiny}}, "only": ["tiny"]}
    start = started(smoke_run, tmp_path, "corpus")
    unkilled = start("unkilled")
    loop = re.compile(r".*(/\.?(best|step)-|step \d in)")  # sft has these too
    moments = [m for m in reference(forks, unkilled, **how) if not loop.match(m)]
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 5


def test_data_and_evaluation_die_at_every_moment(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"overrides": {}}
    start = started(smoke_run, tmp_path, "corpus", "tiny", "sft")
    unkilled = start("unkilled")
    moments = reference(forks, unkilled, **how)
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 10


def test_killed_from_outside_at_random_moments(forks: Workshop, tmp_path: Path) -> None:
    """From nothing to the evaluation, with `kill -9` every so often; as in life, nobody knows where it falls."""
    sft = {"checkpoint_every": 2, "precision": "bf16", "evaluate_every": 4, "samples": 1}
    overrides = {"stages": {"tiny": {"checkpoint_every": 2}, "sft": sft}}
    began = time.monotonic()
    assert forks.run(tmp_path / "unkilled", overrides)["status"] == 0
    took = time.monotonic() - began
    draw, folder, kills = random.Random(1), tmp_path / "run", 0
    folder.mkdir()
    for _ in range(10):
        ended = forks.run(folder, overrides, die_after=draw.uniform(0.1, 0.4) * took)
        whole_stages(folder)
        if ended["status"] == 0:
            break
        assert ended["status"] == -signal.SIGKILL, ended["traceback"]
        kills += 1
    else:
        assert forks.run(folder, overrides)["status"] == 0
    assert kills >= 2
    same(folder, tmp_path / "unkilled")


def test_answers_with_line_separators_outlive_a_resumption(tmp_path: Path) -> None:
    """To Python's splitlines U+2028, U+0085 and form feeds end a line; to JSON lines they do not."""
    file = tmp_path / "samples.jsonl"
    for step in (2, 4, 6):
        append(file, {"step": step, "completion": f"а\u2028б\x85в\x0cг {step}"})
    with open(file, "ab") as cut:
        cut.write('{"step": 6, "completion": "обір'.encode()[:-1])  # killed within a letter
    forget_after(file, 4)
    assert [line["step"] for line in lines_of(file)] == [2, 4]
    assert lines_of(file)[0]["completion"] == "а\u2028б\x85в\x0cг 2"


def test_forced_anew_and_killed_while_the_old_work_goes(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"overrides": {}, "only": ["tiny"]}
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus")
    assert forks.run(folder, die_at="before tiny.partial/checkpoints/step-12", **how)["status"] == -signal.SIGKILL
    assert (
        forks.run(folder, die_at="deleting .tiny.partial.deleted.tmp", force=["tiny"], **how)["status"]
        == -signal.SIGKILL
    )
    ended = forks.run(folder, **how)
    assert ended["status"] == 0, ended["traceback"]
    assert weights(folder)["tiny/model/model.safetensors"] == weights(smoke_run)["tiny/model/model.safetensors"]


def test_the_command_itself(smoke_run: Path, tmp_path: Path) -> None:
    """No fork, no harness: `temper run`, killed as soon as it has a checkpoint, and the same command again."""
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus")
    command = [
        sys.executable,
        "-c",
        "from temper.cli import main; raise SystemExit(main())",
        "run",
        "detox-summarization",
        "--profile",
        "smoke",
        "--stages",
        "tiny",
    ]
    command += ["--set", "threads=1", "tiny.checkpoint_every=2", "--out", str(folder)]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (folder / "tiny.partial" / "checkpoints" / "step-2").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (folder / "tiny").exists(), "the kill came too late to show anything"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "goes on from step" in again.stdout
    assert weights(folder)["tiny/model/model.safetensors"] == weights(smoke_run)["tiny/model/model.safetensors"]
    assert lines_of(folder / "tiny" / "metrics.jsonl") == lines_of(smoke_run / "tiny" / "metrics.jsonl")
