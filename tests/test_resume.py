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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from staged_runs import ENVIRONMENT, Workshop, copy_stages, lines_of, weights, whole_stages
from temper.engine.lines import append, forget_after
from temper.runfolder import progress, read_json

LOOP = re.compile(r".*(/\.?(best|step)-|step \d in|clock.json)")  # moments of training that test_sft_… meets
SFT = {
    "adapter": {"dropout": 0.1}, "batch_size": 4, "accumulation": 2, "precision": "bf16", "warmup": 0,
    "schedule": "constant", "max_steps": 8, "evaluate_every": 2, "checkpoint_every": 2, "patience": 1, "samples": 0,
}  # fmt: skip


def same(folder: Path, reference: Path) -> None:
    """Everything that the clock does not decide is equal in two run folders."""
    assert weights(folder) == weights(reference)
    for stage in (p.parent for p in sorted(reference.glob("*/stage.json")) if "@" not in p.parent.name):
        ours = folder / stage.name
        for name in ("metrics.jsonl", "samples.jsonl", "worst.jsonl"):
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
    for lr in (0.5, 0.06, 0.4, 0.45, 0.35, 0.14, 0.2, 0.1, 1.0, 0.3, 0.25, 0.15, 0.05, 0.03, 0.01):
        settings = {**SFT, "lr": lr, "max_steps": 10}
        how: dict[str, Any] = {"overrides": {"stages": {"sft": settings}}, "only": ["sft"]}
        unkilled = start(f"unkilled-{lr}")
        moments = reference(forks, unkilled, **how)
        lines = lines_of(unkilled / "sft" / "metrics.jsonl")
        steps, best = [x["step"] for x in lines if "loss" in x], [x["step"] for x in lines if x.get("best")]
        assert steps == list(range(1, len(steps) + 1))
        if 2 < best[-1] < len(steps) < 10:
            break
    else:
        pytest.fail("no learning rate makes validation improve and then stop the run early; try others")
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 20


def test_adafactor_dies_and_goes_on(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Its factored moments are part of a checkpoint as others are."""
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news")
    settings = {**SFT, "optimizer": "adafactor", "lr": 0.02, "max_steps": 9}
    how: dict[str, Any] = {"overrides": {"stages": {"sft": settings}}, "only": ["sft"]}
    unkilled = start("unkilled")
    moments = [m for m in reference(forks, unkilled, **how) if "step-" in m]
    assert die_at_each(forks, moments[:: max(1, len(moments) // 3)], start, unkilled, **how) >= 2


def test_a_killed_run_goes_on_with_fewer_tokens_at_a_time(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """As after the end of the memory: from its checkpoint, to the same losses but for rounding."""
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news", "sft")
    settings = {
        **SFT,
        "lr": 0.01,
        "precision": "float32",
        "adapter": {"dropout": 0.0},
        "patience": None,
        "micro_tokens": 2048,
    }
    fewer = {"overrides": {"stages": {"sft": {**settings, "micro_tokens": 64}}}, "only": ["sft"]}
    how: dict[str, Any] = {"overrides": {"stages": {"sft": settings}}, "only": ["sft"]}
    unkilled, folder = start("unkilled"), start("killed")
    moments = reference(forks, unkilled, **how)
    at = [m for m in moments if "step-4" in m][-1]
    assert forks.run(folder, die_at=at, **how)["status"] == -signal.SIGKILL
    ended = forks.run(folder, **fewer)
    assert ended["status"] == 0, ended["traceback"]
    assert "goes on from step" in (folder / "pipeline.log").read_text(encoding="utf-8")
    found, wanted = (lines_of(f / "sft" / "metrics.jsonl") for f in (folder, unkilled))
    assert [x["step"] for x in found] == [x["step"] for x in wanted]
    losses = [
        [x[kind] for kind in ("loss", "validation_loss") for x in lines if kind in x] for lines in (found, wanted)
    ]
    assert len(losses[0]) >= 10 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pretraining_dies_at_every_moment(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """The tokenizer is part of the work: half of it must not be taken for the whole."""
    tiny = {"max_steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
    how: dict[str, Any] = {"overrides": {"stages": {"tiny": tiny}}, "only": ["tiny"]}
    start = started(smoke_run, tmp_path, "corpus")
    unkilled = start("unkilled")
    moments = [m for m in reference(forks, unkilled, **how) if not LOOP.match(m)]
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 5


def test_data_classifier_teacher_and_evaluation_die_at_every_moment(
    forks: Workshop, smoke_run: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"overrides": {}}
    anew = ("news", "judge", "toxic_news", "compare")  # one stage of each of these kinds

    def start(name: str) -> Path:
        return copy_stages(smoke_run, tmp_path / name, but=anew)

    unkilled = start("unkilled")
    moments = [m for m in reference(forks, unkilled, **how) if not LOOP.match(m)]
    assert all(any(m.endswith(f"before {name}") for m in moments) for name in anew)
    assert die_at_each(forks, moments, start, unkilled, **how) >= 0.9 * len(moments) > 30


def test_killed_from_outside_at_random_moments(forks: Workshop, tmp_path: Path) -> None:
    """From nothing to the last evaluation, again and again until twenty `kill -9` fell, and some of them amid rl.

    As in life, nobody knows where they fall. Between two of its moments rl is at a rollout or an update.
    """
    often = {"checkpoint_every": 2, "precision": "bf16"}
    stages = {
        "tiny": {"checkpoint_every": 2},
        "sft": {**often, "evaluate_every": 4, "samples": 1},
        "grpo": {**often, "max_steps": 24},
    }
    how: dict[str, Any] = {"overrides": {"stages": stages}}
    began = time.monotonic()
    assert forks.run(tmp_path / "unkilled", **how)["status"] == 0
    took = time.monotonic() - began
    draw, folder, fell, ends = random.Random(1), tmp_path / "run", Counter[str](), 0
    folder.mkdir()
    for start in range(60):
        enough = fell.total() >= 20 and fell["grpo.partial"] >= 3
        ended = forks.run(folder, die_after=None if enough else draw.uniform(0.05, 0.25) * took, **how)
        whole_stages(folder)
        if ended["status"] == -signal.SIGKILL:
            fell.update([p.name for p in folder.glob("*.partial")] or ["between stages"])
            continue
        assert ended["status"] == 0, ended["traceback"]
        same(folder, tmp_path / "unkilled")
        ends += 1
        if enough:
            break
        folder = tmp_path / f"run-{start}"
    print(f"killed in {dict(fell)}; {ends} runs came to their end")
    assert ends and fell.total() >= 20 and fell["grpo.partial"] >= 3, fell


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


def test_killed_while_the_best_weights_are_written_a_second_time(
    forks: Workshop, smoke_run: Path, tmp_path: Path
) -> None:
    """The start goes on from before the best. A kill between the old copy and the new one must not cost all the way."""
    often = {**SFT, "lr": 5e-3, "checkpoint_every": 5, "keep_checkpoints": 1}
    how: dict[str, Any] = {"overrides": {"stages": {"sft": often}}, "only": ["sft"]}
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news")
    unkilled = start("unkilled")
    assert forks.run(unkilled, **how)["status"] == 0
    best = [x["step"] for x in lines_of(unkilled / "sft" / "metrics.jsonl") if x.get("best")]
    assert {4, 6} <= set(best), "validation must improve at the steps 4 and 6 to show anything"
    for moment in ("deleting sft.partial/checkpoints/best-6", "before sft.partial/checkpoints/best-6"):
        folder = start(moment.split()[0])
        for death in ("step 7 in sft.partial/metrics.jsonl", moment):
            assert forks.run(folder, die_at=death, **how)["status"] == -signal.SIGKILL
        (folder / "sft.partial" / "checkpoints" / ".step-3.tmp").mkdir()  # of an earlier kill: half of a checkpoint
        ended = forks.run(folder, die_at="step 6 in sft.partial/metrics.jsonl", **how)
        assert ended["status"] == -signal.SIGKILL
        assert (folder / "pipeline.log").read_text(encoding="utf-8").count("goes on from step 5") == 2
        assert sorted(p.name for p in (folder / "sft.partial" / "checkpoints").iterdir()) == ["best-6", "step-5"]
        assert forks.run(folder, **how)["status"] == 0
        same(folder, unkilled)


def test_a_killed_run_leaves_a_manifest(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """So its folder is known as a run of this recipe: to reports, to `temper prune`, to other recipes."""
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus")
    assert forks.run(folder, {}, die_at="step 3 in tiny.partial/metrics.jsonl")["status"] == -signal.SIGKILL
    manifest = read_json(folder / "manifest.json")
    assert [(s["name"], s["status"]) for s in manifest["stages"]][:2] == [("corpus", "done"), ("tiny", "pending")]
    ended = forks.run(folder, {"name": "another"})
    assert ended["error"] and "belongs to the recipe «detox-summarization»" in ended["error"]["text"]


def temper_run(folder: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """`temper run` of the pretraining stage, and its environment: no fork, no harness."""
    command = [sys.executable, "-c", "from temper.cli import main; raise SystemExit(main())"]
    command += ["run", "detox-summarization", "--profile", "smoke", "--stages", "tiny"]
    command += ["--set", f"threads={threads}", "tiny.checkpoint_every=2", "--out", str(folder)]
    return command, {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}


def killed_at(step: int, folder: Path, threads: int) -> None:
    """Start the command, and kill it as soon as it has the checkpoint of a step."""
    command, environment = temper_run(folder, threads)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while progress(folder / "tiny.partial")[0] < step and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not (folder / "tiny").exists(), "the kill came too late to show anything"


def finished(folder: Path, threads: int) -> str:
    """Run the command to its end; returns what it said."""
    command, environment = temper_run(folder, threads)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_command_itself(smoke_run: Path, tmp_path: Path) -> None:
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus")
    killed_at(2, folder, threads=1)
    assert "goes on from step" in finished(folder, threads=1)
    assert weights(folder)["tiny/model/model.safetensors"] == weights(smoke_run)["tiny/model/model.safetensors"]
    assert lines_of(folder / "tiny" / "metrics.jsonl") == lines_of(smoke_run / "tiny" / "metrics.jsonl")


def test_the_command_itself_with_two_threads(smoke_run: Path, tmp_path: Path) -> None:
    """Whichever thread is quicker: the bits are those of a run that nobody killed."""
    unkilled = copy_stages(smoke_run, tmp_path / "unkilled", "corpus")
    command, environment = temper_run(unkilled, threads=2)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = copy_stages(smoke_run, tmp_path / "run", "corpus")
    killed_at(4, folder, threads=2)
    assert "goes on from step" in finished(folder, threads=2)
    assert process.wait(timeout=120) == 0
    assert read_json(folder / "manifest.json")["hardware"]["threads"] == 2
    same(folder, unkilled)
