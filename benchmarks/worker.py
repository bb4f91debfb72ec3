"""One side of a contest in a process of its own: it works when it is told to, and says how long that took.

Started by `bench.py`; a line of JSON a command on its input, a line of JSON an answer on its output.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from contest import Contest, Side

# What a side loads in any case, before its memory is counted. pyarrow loads pandas where it is installed, as TRL has it.
MODEL = ["transformers", "transformers.models.qwen2.modeling_qwen2"]
IMPORTS = {
    "temper": [*MODEL, "peft", "pandas", "pyarrow.dataset", "pyarrow.parquet", "temper.app", "temper.stages"],
    "trl": [
        *MODEL, "peft", "datasets", "trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer",
        "trl.trainer.grpo_trainer",
    ],
    "transformers": MODEL,
}  # fmt: skip


def contest_named(module: str, name: str, against: str) -> Contest:
    found = importlib.import_module(module).CONTESTS
    return next(c for c in found if (c.name, c.against) == (name, against))


def status(key: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    warnings.simplefilter("ignore")
    side: Side | None = None
    base = 0
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            told = json.loads(line)
            out: Any = None
            match told["do"]:
                case "make":
                    side = None
                    gc.collect()
                    contest = contest_named(order["module"], order["name"], order["against"])
                    for module in IMPORTS["temper" if order["side"] == "temper" else contest.tool]:
                        importlib.import_module(module)
                    base = status("VmRSS:") + (told["weights"] if contest.weights else 0)
                    reset_peak()
                    own = Path(tempfile.mkdtemp(dir=folder))
                    side = contest.make(order["side"], own, told["settings"])
                    out = {"tokens": side.tokens, "flops": side.flops}
                case "epoch":
                    assert side is not None
                    began = time.perf_counter()
                    side.epoch()
                    out = time.perf_counter() - began
                case "loss":
                    assert side is not None
                    out = side.loss()
                case "memory":
                    out = status("VmHWM:") - base
            answers.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
