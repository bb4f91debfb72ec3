"""The stage `sft`: what is validated of rows that are longer than the model was made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from preferred import answer_logps, model_at, pairs, run, text
from staged_runs import lines_of
from temper.runfolder import read_json

ROWS = [
    {"prompt": p["prompt"], "completion": p["chosen"] if k % 3 else text(*[*range(40, 55)] * 9, k + 3)}
    for k, p in enumerate(pairs())
]


def test_validation_past_the_context_is_scored_in_full_where_positions_go_on(tmp_path: Path) -> None:
    short = model_at(tmp_path / "short", max_position_embeddings=24)
    stage = run(tmp_path, short, ROWS, stage="sft", max_steps=1, lr=1e-12)
    rows = pyarrow.parquet.read_table(stage.parent / "rows" / "data" / "validation.parquet").to_pylist()
    long = sum(len(r["completion"].split()) > 24 for r in rows)
    info = read_json(stage / "stage.json")
    assert long and len(rows) == 8 and "8 for validation" in info["summary"]
    assert any(f"{long} of 8 validation rows are longer than the model's context (24" in w for w in info["warnings"])
    model = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float64).eval()
    losses = -np.concatenate([answer_logps(model, row, "completion") for row in rows])
    [line] = [x for x in lines_of(stage / "metrics.jsonl") if "validation_loss" in x]
    assert line["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_past_the_last_position_is_counted_apart(tmp_path: Path) -> None:
    stage = run(tmp_path / "a", model_at(tmp_path / "tabled", "gpt2"), ROWS, stage="sft", max_steps=1)  # 128 places
    info = read_json(stage / "stage.json")
    [told] = [w for w in info["warnings"] if "validation rows" in w]
    lost = int(told.split()[0])
    assert "cannot be scored" in told and f"; {8 - lost} for validation" in info["summary"] and lost > 0
