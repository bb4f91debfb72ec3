"""What a base in few bits saves: LoRA on a float32 base of 100 million parameters, beside QLoRA on the same one, each in a
process of its own, the same rows in the same order, the moments of both in 8 bits.

    python benchmarks/qlora.py [--steps 40] [--pretrain 120] [--out FILE]

The base is pretrained here first, for a loss on random weights says little of rounding. Printed and written to
benchmarks/results/<machine>-qlora.json: peak memory above imports of the whole stage, of loading and of training alone; the
loss over the last quarter of the steps; seconds. Memory is what the kernel counts for the process (VmHWM).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS: dict[str, dict[str, Any]] = {"lora": {}, "nf4": {"quantize": "nf4"}, "int8": {"quantize": "int8"}}
ALSO = ["transformers.models.llama.modeling_llama", "bitsandbytes", "peft.tuners.lora.bnb", "transformers.integrations.bitsandbytes", "ruamel.yaml"]  # fmt: skip
SHAPE = {"vocabulary": 2000, "hidden": 768, "layers": 14, "heads": 12, "intermediate": 2048, "context": 256}


def temper(*words: str) -> None:
    """The command, in a process of its own."""
    code = "from temper.cli import main; raise SystemExit(main())"
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def recipe(folder: Path, base: str, stages: dict[str, Any]) -> Path:
    data = {"stage": "data", "source": "mini:ru-jokes", "split": "train", "take": 3000, "validation": 50, "test": 0, "near_leaks": False,
            "messages": "{parsed}", "drop": {"turns": [2, 2]}, "best": {"by": "total_mark", "at_least": 3}, "format": {"chat": "speakers"}}  # fmt: skip
    file = folder / "own.yaml"
    file.write_text(json.dumps({"name": "qlora", "model": base, "seed": 7, "stages": {"jokes": data, **stages}}))
    return file


def pretrained(folder: Path, steps: int) -> Path:
    """A base of 100 million parameters that has read something."""
    talk = {"stage": "data", "source": "mini:ru-talk", "text": "{text}", "take": 8000, "validation": 50, "test": 0, "near_leaks": False}  # fmt: skip
    made = {"stage": "pretrain", "data": "talk", "shape": SHAPE, "lr": 6e-4, "batch_size": 64, "max_steps": steps, "precision": "bf16"}  # fmt: skip
    file = folder / "base.yaml"
    file.write_text(json.dumps({"name": "base", "model": "large", "seed": 7, "stages": {"talk": talk, "large": made}}))
    temper("run", str(file), "--out", str(folder / "base"))
    return folder / "base" / "large" / "model"


def child(file: str, out: str) -> None:
    """Run a recipe here; print what memory it took above imports."""
    from worker import IMPORTS, reset_peak, status

    for module in [*IMPORTS["temper"], *ALSO]:  # what is loaded in any case
        importlib.import_module(module)
    from temper import pipeline
    from temper import recipe as recipes
    from temper.job import Log

    loaded = recipes.load(file)
    folder = Path(out)
    base = status("VmRSS:")
    reset_peak()
    peaks: dict[str, int] = {}

    say = Log.__call__

    def heard(log: Log, text: str, style: str = "") -> None:
        if "really used" in text:  # the model is there, and one micro-batch has been passed through it
            peaks["loading"] = status("VmHWM:") - base
            reset_peak()
        say(log, text, style)

    Log.__call__ = heard  # type: ignore[method-assign]
    pipeline.run(loaded, folder)
    peaks["training"] = status("VmHWM:") - base
    print(json.dumps(peaks))


def measured(folder: Path, base: Path, name: str, steps: int) -> dict[str, Any]:
    stage = {"stage": "sft", "model": "base", "data": "jokes", "adapter": {"method": "lora", "r": 16, "alpha": 16, "dropout": 0}, "max_steps": steps,
             "batch_size": 16, "lr": 1e-3, "optimizer": "adamw_8bit", "micro_tokens": 256, "row_tokens": 256, "activation_checkpointing": True, "samples": 0, **WAYS[name]}  # fmt: skip
    (folder / name).mkdir()
    file = recipe(folder / name, str(base), {"tuned": stage})
    temper("run", str(file), "--stages", "jokes", "--out", str(folder / name / "run"))  # rows are made before
    done = subprocess.run(
        [sys.executable, str(HERE / "qlora.py"), "--child", str(file), str(folder / name / "run")],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    peaks = json.loads(done.stdout.splitlines()[-1])
    run = folder / name / "run"
    lines = [json.loads(x) for x in (run / "tuned/metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "loss" in x]
    held = [x["validation_loss"] for x in lines if "validation_loss" in x]
    info = json.loads((run / "tuned/stage.json").read_text())
    last = losses[-max(1, len(losses) // 4) :]
    return {
        "peak_bytes": max(peaks.values()), **{f"{k}_bytes": v for k, v in peaks.items()}, "loss": sum(last) / len(last), "validation_loss": held[-1],
        "first_loss": losses[0], "seconds": info["seconds"], "parameters": info["parameters"],
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pretrain", type=int, default=120)
    parser.add_argument("--base", type=Path, help="a base made before")
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = asked.base or pretrained(Path(place), asked.pretrain)
        found = {name: measured(Path(place), base.resolve(), name, asked.steps) for name in asked.only}
    for name, one in found.items():
        beside = found["lora"]
        print(
            f"{name:5} peak {one['peak_bytes'] / 1e6:6.0f} MB ({one['peak_bytes'] / beside['peak_bytes']:.2f}), loading "
            f"{one['loading_bytes'] / 1e6:.0f}, training {one['training_bytes'] / 1e6:.0f} ({one['training_bytes'] / beside['training_bytes']:.2f}); loss "
            f"{one['first_loss']:.3f} → {one['loss']:.4f} ({one['loss'] / beside['loss'] - 1:+.1%}), validation {one['validation_loss']:.4f} "
            f"({one['validation_loss'] / beside['validation_loss'] - 1:+.1%}); {one['seconds']:.0f} s"
        )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
