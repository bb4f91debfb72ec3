"""Temper on a graphics card: checks that its numbers are right there, then times beside TRL, in one run of a few minutes.

    python benchmarks/gpu.py [--wheels DIR] [--seconds 520] [--only PART …] [--out FILE]

Shapes of Qwen2.5 (0.5 and 1.5 billion parameters), random weights, bf16. One process, tools in turns: each warms up
with one pass over the work, then three are timed. Memory is the card's peak above the weights of the tool at work. Without
TRL the comparisons with it are left out; `--wheels` names a folder of wheels that are unpacked and put before what is
installed. After every part results/<card>.json is written anew, in the form of `bench.py`; what there was no time for, and
what failed, stands there under «left_out» and «failed». `--dry` runs all of it in a tiny shape on whatever there is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import contest
import shapes
import torch
from contest import Settings
from gpu_checks import check
from gpu_machine import SHAPES, Bench, machine, peak, unpacked
from gpu_times import beside_trl, passes

HERE = Path(__file__).parent
BATCH = 64  # examples of a step: 8 of TRL's default batches
OURS: Settings = {"precision": "bf16", "micro_tokens": 16_384, "row_tokens": 2048}
WIDE: Settings = {"gradient_checkpointing": False, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
SORTED: Settings = {"train_sampling_strategy": "group_by_length"}


def parts() -> list[tuple[str, float, Callable[[Bench], None]]]:
    """(name, seconds that should be left for it, what it does), the most important ones first."""
    dpo, sft = {"rows": 128}, {"rows": 256}
    rl = {"prompt": 600, "completions": 8, "new": 64, "prompts": 8, "steps": 1}
    step: Settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8}
    plain, tuned = "TRL as documented", "TRL tuned"
    whole, flash = {**sft, "lora": False}, "TRL tuned, flash-attn"
    wide = {**WIDE, **SORTED, "loss_type": "chunked_nll"}
    return [
        ("checks", 20, check),
        ("tree pass", 60, passes),
        ("sft 0.5b", 60, beside_trl("sft", "0.5b", {**OURS, **whole}, {
            plain: {**whole, **step}, tuned: {**whole, **wide}, flash: {**whole, **wide, "flash": True}}, 2)),
        ("grpo 0.5b", 60, beside_trl("grpo", "0.5b", {**OURS, **rl}, {
            plain: rl, tuned: {**rl, "per_device_train_batch_size": 64, "gradient_checkpointing": False, "weights": "bfloat16"}}, 4)),
        ("dpo 0.5b", 50, beside_trl("dpo", "0.5b", {**OURS, **dpo}, {
            plain: {**dpo, **step}, tuned: {**dpo, **WIDE, **SORTED, "frozen_half": True}}, 2.5)),
        ("sft 1.5b", 60, beside_trl("sft", "1.5b", {**OURS, **sft, "lora": True}, {
            plain: {**sft, "lora": True, **step}, tuned: {**sft, "lora": True, **wide, "frozen_half": True}}, 2)),
        ("grpo 1.5b", 60, beside_trl("grpo", "1.5b", {**OURS, **rl}, {plain: rl}, 4)),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to take packages from")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names begin so")
    parser.add_argument("--dry", action="store_true", help="a tiny shape: does it run?")
    parser.add_argument("--out", type=Path, help="default: results/<card>.json beside this file")
    asked = parser.parse_args()
    until = time.perf_counter() + asked.seconds
    warnings.simplefilter("ignore")
    for name in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE", "TQDM_DISABLE"):
        os.environ[name] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, for both sides
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        if asked.wheels:
            unpacked(asked.wheels, Path(folder) / "wheels")
        sys.path.insert(1, str(HERE.parent / "src"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and not asked.dry:
            parser.error("there is no graphics card; --dry runs on a processor")
        contest.BATCH = contest.BATCH if asked.dry else BATCH
        shapes.VOCABULARY = SHAPES["dry" if asked.dry else "0.5b"]["vocab_size"]
        kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
        peaks = {k: peak(device, d, 256 if asked.dry else 8192) for k, d in kinds.items()}
        facts = machine(device, peaks)
        name = "".join(c if c.isalnum() else "-" for c in facts["processor"].lower()).strip("-")
        b = Bench(device, asked.dry, until, asked.out or HERE / "results" / f"{name}.json", Path(folder), facts, peaks)
        for name, needs, do in parts():
            if asked.only and not name.startswith(tuple(asked.only)):
                continue
            left = until - time.perf_counter()
            if left < needs and not asked.dry:
                facts["left_out"][name] = f"{left:.0f} s were left, and it may take {needs:.0f}"
                continue
            print(f"{name} ({left:.0f} s left)", flush=True)
            try:
                do(b)
            except Exception as error:  # one part must not take the others with it
                traceback.print_exc()
                facts["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
            b.memory(reset=True)
            b.write()
        b.write()
        print(f"written: {b.file}; left out: {facts['left_out']}; failed: {facts['failed']}")
    return 1 if facts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
