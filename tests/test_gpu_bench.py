"""The benchmark for graphics cards runs from end to end, in a tiny shape on a processor, and says what was missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_every_kind_of_part_runs_dry(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "results.json"
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry", "--out", str(out), "--only", "checks", "tree pass", "grpo 0.5b"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    found = json.loads(out.read_text())
    assert found["machine"]["failed"] == {} and len(found["machine"]["checks"]) == 4
    kinds = {w["name"].split("-dry")[0]: w for w in found["workloads"]}
    assert set(kinds) == {"tree-pass", "grpo"}
    for work in kinds.values():
        assert work["loss_difference"] < 0.02 * abs(work["losses"]["temper"]), "both sides did the same work"
        assert work["seconds"]["temper"] > 0 and work["time_ratio"]["low"] <= work["time_ratio"]["high"]
