"""Memory of each process under DDP and under FSDP2, on a model whose weights dominate.

    python benchmarks/processes.py [--processes 2] [--hidden 768] [--layers 12] [--steps 4]

A recipe trains a whole model with AdamW in float32, once with each, by the command line. Peaks are those that the kernel notes
(VmHWM), above a process of the same launch that imports Temper, meets the others, and ends. Printed and written to
benchmarks/results/processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ALONE = (
    "import temper.app, transformers, peft, torch; from temper.engine.processes import Processes; "
    "from transformers import LlamaForCausalLM; w = Processes('ddp'); print(w.summed([1.0])); "
    "import time; time.sleep(3); w.close()"
)


def peaks(words: list[str], folder: Path, *, alone: bool = False) -> list[int]:
    """Peak bytes of each process that a command starts, the largest first; `alone`: of the command itself."""
    found: dict[int, int] = {}
    env = os.environ | {"PYTHONPATH": str(HERE.parent / "src"), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)

        def watch() -> None:
            while process.poll() is None:
                parent = psutil.Process(process.pid)
                for child in [parent] if alone else parent.children(recursive=True):
                    try:
                        status = Path(f"/proc/{child.pid}/status").read_text()
                        ranked = b"RANK=" in Path(f"/proc/{child.pid}/environ").read_bytes()
                    except (OSError, psutil.Error):
                        continue
                    line = next((x for x in status.splitlines() if x.startswith("VmHWM")), "")
                    if line and (ranked or alone):
                        found[child.pid] = max(found.get(child.pid, 0), int(line.split()[1]) * 1024)
                time.sleep(0.05)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        if process.wait():
            raise SystemExit((folder / "log").read_text()[-3000:])
        watcher.join()
    return sorted(found.values(), reverse=True)


def saved(folder: Path, hidden: int, layers: int) -> int:
    """A model in a folder; bytes of its weights."""
    import shapes
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shapes.VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=shapes.END, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shapes.tokenizer().save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    import shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "processes.json")
    asked = parser.parse_args()
    out: dict[str, Any] = {"processes": asked.processes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out["weights_bytes"] = saved(folder / "base", asked.hidden, asked.layers)
        rows = [json.dumps({"prompt": shapes.text(p[:40]), "completion": shapes.text(a[:-1][:20])}) for p, a in shapes.lognormal(64)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        recipe = {
            "name": "memory", "model": str(folder / "base"),
            "stages": {
                "rows": {"stage": "data", "source": "rows.jsonl", "validation": 8, "test": 0, "near_leaks": False},
                "sft": {"stage": "sft", "data": "rows", "batch_size": 8, "max_steps": asked.steps, "samples": 0, "worst": 0, "keep_best": False},
            },
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.processes}"]
        (folder / "alone.py").write_text(ALONE)
        base = peaks([sys.executable, *run, "alone.py"], folder)
        out["imports_bytes"] = base[0]
        for parallel in ("ddp", "fsdp"):
            command = [sys.executable, "-m", "temper", "run", "recipe.yaml", "--out", parallel, "--set", f"launch={{processes: {asked.processes}, parallel: {parallel}}}"]
            found = [p - base[0] for p in peaks(command, folder)]
            out[parallel] = {"peak_bytes": found}
            print(f"{parallel}: {', '.join(f'{p / 1e6:.0f} MB' for p in found)} above imports", flush=True)
    out["ratio"] = max(out["fsdp"]["peak_bytes"]) / max(out["ddp"]["peak_bytes"])
    print(f"weights {out['weights_bytes'] / 1e6:.0f} MB; FSDP2 takes {out['ratio']:.2f} of DDP's memory in the process that takes most")
    asked.out.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written: {asked.out}")


if __name__ == "__main__":
    main()
