"""What is set before any arithmetic runs."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import temper
from temper.engine import device

PROGRAM = """
import psutil, torch
from temper.engine import device
if {kept}:
    device.keep_memory()
resident = lambda: psutil.Process().memory_info().rss
before = resident()
piece = torch.ones(16 * 2**20)  # 64 MiB
full = resident() - before
del piece
print(full, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_the_allocator_keeps_what_tensors_leave(kept: bool) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM.format(kept=kept)], capture_output=True, text=True, check=True)
    full, left = map(int, ran.stdout.split())
    assert full > 60 * 2**20
    assert (left > 60 * 2**20) == kept


@pytest.mark.parametrize(
    ("flags", "kind", "said"),
    [
        ("flags\t\t: fpu avx2 avx512f", "bf16", True),
        ("flags\t\t: fpu avx512f avx512_bf16", "bf16", False),
        ("flags\t\t: fpu avx512f avx512_bf16", "fp16", True),
        ("flags\t\t: fpu amx_fp16", "fp16", False),
        ("Features\t: fp asimd asimdhp bf16", "bf16", False),
        ("flags\t\t: fpu", "float32", False),
        ("model name\t: unknown", "bf16", False),
    ],
)
def test_a_precision_that_the_processor_lacks_is_told(
    flags: str, kind: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    text = device.emulated(kind, torch.device("cpu"))
    assert (text is not None) == said and (text is None or "float32" in text)
    assert device.emulated(kind, torch.device("cuda")) is None


def test_it_stands_among_a_runs_warnings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does an example that is longer than what a micro-batch may hold: it is trained whole."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu\n")
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    rows = [{"text": "Так. " * (40 if k == 3 else 2) + str(k)} for k in range(12)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    raw = {"name": "x", "model": str(tiny_model), "threads": 1, "stages": {
        "texts": {"stage": "data", "source": "t.jsonl", "text": "{text}", "validation": 0, "test": 0},
        "sft": {"stage": "sft", "data": "texts", "max_steps": 1, "batch_size": 12, "precision": "bf16", "micro_tokens": 32, "row_tokens": 32},
    }}  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(raw))
    run = temper.run(tmp_path / "own.yaml", out=tmp_path / "run", quiet=True)
    info = json.loads((run / "sft/stage.json").read_text())
    assert any("does not compute in bf16 itself" in w for w in info["warnings"])
    (told,) = [w for w in info["warnings"] if "micro_tokens is 32" in w]
    longest = int(told.split(" has ")[1].split(" ")[0])
    assert longest > 32 and info["examples"] == 12 and info["tokens"] > longest
