"""lm-eval asks the server, and finds what its own `hf` model finds on the same weights. It imports for long: `pytest -m claims`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import server

pytestmark = pytest.mark.claims

TASKS = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_choice": ["blue", "green", "red and"], "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "write": {
        "output_type": "generate_until", "doc_to_target": "said", "generation_kwargs": {"until": ["e"], "do_sample": False, "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
ASK = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
folder, runs = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name, how in runs.items():
    done = lm_eval.simple_evaluate(task_manager=TaskManager(include_path=folder), log_samples=True, bootstrap_iters=0, **how)
    found[name] = {task: [s["resps"] for s in sorted(some, key=lambda s: s["doc_id"])] for task, some in done["samples"].items()}
json.dump(found, open(folder + "/found.json", "w"))
"""


def test_lm_eval_finds_what_it_finds_without_the_server(served_models: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Question {k}: what colour? {'so ' * k}", "answer": k % 3, "said": "x"} for k in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        shared = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**shared, "doc_to_text": "{{question}}", **task}))
    base = tmp_path / "base"
    shutil.copytree(served_models / "base", base)
    settings = json.loads((base / "generation_config.json").read_text())
    # lm-eval's `hf` shows end tokens that are not special, such as those by which this model ends often
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": settings["eos_token_id"][0]}))
    with server(str(base), "--votes", str(tmp_path / "votes.sqlite")) as at:
        hf: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": str(base), "dtype": "float32"}, "device": "cpu", "batch_size": 1}
        asked = {"model": "base", "num_concurrent": 6, "max_length": 400, "max_retries": 1, "timeout": 60, "tokenizer": str(base)}
        texts = {"model": "local-completions", "model_args": {**asked, "base_url": f"{at.url}/completions", "tokenized_requests": True, "add_bos_token": True}}
        chats = {"model": "local-chat-completions", "model_args": {**asked, "base_url": f"{at.url}/chat/completions"}}
        runs: dict[str, Any] = {
            "hf": {**hf, "tasks": list(TASKS)}, "texts": {**texts, "tasks": list(TASKS), "batch_size": 4},
            "hf chat": {**hf, "model_args": {**hf["model_args"], "add_bos_token": False}, "tasks": ["write"], "apply_chat_template": True}, "chat": {**chats, "tasks": ["write"], "apply_chat_template": True},
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", ASK, str(tmp_path), json.dumps(runs)], capture_output=True, text=True, timeout=500,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["texts"]["write"] == found["hf"]["write"] and found["chat"]["write"] == found["hf chat"]["write"]
    assert found["hf"]["write"] != found["hf chat"]["write"]
    pairs = [pair for both in zip(found["texts"]["choose"], found["hf"]["choose"], strict=True) for pair in zip(*both, strict=True)]
    assert len(pairs) == 36
    for ((ours, our_greedy),), ((theirs, their_greedy),) in pairs:
        assert float(ours) == pytest.approx(float(theirs), abs=1e-4) and our_greedy == their_greedy
