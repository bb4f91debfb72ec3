"""`make bench` from end to end: one contest with few rows, and what it writes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), "--threads", "1", *words], capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "TEMPER_BENCH_ROWS": "200"},
    )  # fmt: skip


def test_a_contest_is_held_and_written_beside_those_before(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "results.json"
    kept = {"name": "scoring-float32", "against": "transformers padded", "time_ratio": {"median": 9}}
    out.write_text(json.dumps({"machine": {}, "workloads": [kept]}))
    ended = bench("--only", "preparation", "--against", "documented", "--out", str(out))
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    found = json.loads(out.read_text())
    assert found["machine"]["peak_gflops"]["float32"] > 0 and found["machine"]["versions"]["trl"]
    old, new = found["workloads"]
    assert old == kept
    assert (new["name"], new["against"]) == ("preparation", "TRL SFTTrainer as documented")
    ratio = new["time_ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and new["rounds"] == 3
    assert new["loss_difference"] == 0 and new["losses"]["temper"] > 200, "both train on the same tokens"
    assert new["memory_ratio"] > 0 and "times as fast" in ended.stdout


def test_names_that_are_none_and_too_few_rounds_are_refused() -> None:
    ended = bench("--only", "sftt")
    assert ended.returncode == 2 and "sft-lora-float32" in ended.stderr
    ended = bench("--rounds", "1")
    assert ended.returncode == 2 and "three rounds at least" in ended.stderr


def test_every_contest_names_what_it_stands_against_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench")
    every = [(c.name, c.against) for m in bench.MODULES for c in importlib.import_module(m).CONTESTS]
    assert len(every) == len(set(every)) and len(every) > 30
    names = {name.rsplit("-", 1)[0] for name, _ in every}
    assert {"tree_pass-groups", "sft-lora", "sft-full", "dpo", "grpo-long", "grpo-short", "rollouts-ragged"} <= names
