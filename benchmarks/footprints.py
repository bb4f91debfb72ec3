"""Memory of a training process as `temper plan --gpus` predicts it from shapes, and as the kernel measures it.

    python benchmarks/footprints.py [--only NAME …]

Models whose weights dominate are trained by the command line, by one process and by two with DDP and FSDP2, on a processor.
Peaks are those that the kernel notes (VmHWM), the largest of the processes, above what a process
takes that trains a model of next to nothing. Each case is printed and written to benchmarks/results/footprints.json as it is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import peaks

HERE = Path(__file__).parent
WIDTH = 128  # tokens of an example, half of them its answer
TOKENS = 512

# Qwen2's shape: hidden width, layers; then what differs from a whole model trained with AdamW, `TOKENS` at once
CASES: dict[str, dict[str, Any]] = {
    "whole": {"hidden": 768, "layers": 6},
    "lora": {"hidden": 768, "layers": 10, "adapter": {"method": "lora", "r": 16}},
    "sgd": {"hidden": 1024, "layers": 3, "optimizer": "sgd"},
    "recomputed": {"hidden": 512, "layers": 12, "activation_checkpointing": True},
    "twice": {"hidden": 512, "layers": 12, "passes": 2},
    "lora-recomputed": {"hidden": 1024, "layers": 5, "adapter": {"method": "lora", "r": 16}, "activation_checkpointing": True},
    "sgd-recomputed": {"hidden": 512, "layers": 12, "optimizer": "sgd", "activation_checkpointing": True},
}  # fmt: skip
SMALL = {"hidden": 64, "layers": 1}
WAYS = {"one": (1, None), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}


def config(hidden: int, layers: int) -> Any:
    import shapes
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shapes.VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=shapes.END,
    )  # fmt: skip


def saved(folder: Path, hidden: int, layers: int) -> None:
    """A model with its tokenizer, and rows of `WIDTH` tokens."""
    import shapes
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(config(hidden, layers)).save_pretrained(folder / "base")
    shapes.tokenizer().save_pretrained(folder / "base")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(160):
        ids = torch.randint(shapes.FIRST, shapes.VOCABULARY, (WIDTH - 1,), generator=draw).tolist()
        rows.append(json.dumps({"prompt": shapes.text(ids[: WIDTH // 2]), "completion": shapes.text(ids[WIDTH // 2 :])}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def recipe(folder: Path, tokens: int, processes: int, case: dict[str, Any]) -> Path:
    """Three steps, each process's micro-batches full."""
    more = {k: v for k, v in case.items() if k not in ("hidden", "layers", "passes")}
    size = tokens // WIDTH * processes * case.get("passes", 1)
    sft = {"stage": "sft", "data": "rows", "batch_size": size, "max_steps": 3, "micro_tokens": tokens, "row_tokens": WIDTH,
           "samples": 0, "worst": 0, "keep_best": False, **more}  # fmt: skip
    rows = {"stage": "data", "source": "rows.jsonl", "validation": 8, "test": 0, "near_leaks": False, "format": {"separator": " "}}
    file = folder / f"recipe{processes}.yaml"
    file.write_text(json.dumps({"name": "memory", "model": str(folder / "base"), "threads": 1, "stages": {"rows": rows, "sft": sft}}))
    return file


def measured(folder: Path, tokens: int, processes: int, parallel: str | None, case: dict[str, Any]) -> int:
    """The peak of the process that takes most."""
    file = recipe(folder, tokens, processes, case)
    words = [sys.executable, "-m", "temper", "run", str(file), "--out", str(folder / f"{parallel}")]
    if parallel is not None:
        words += ["--set", f"launch={{processes: {processes}, parallel: {parallel}}}"]
    return peaks(words, folder, alone=parallel is None)[0]


def taken_anyway(way: str) -> int:
    """Peak of a process that trains next to nothing, above what is predicted of that: imports, rows, buffers of libraries."""
    processes, parallel = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        saved(Path(folder), SMALL["hidden"], SMALL["layers"])
        return measured(Path(folder), WIDTH, processes, parallel, SMALL) - round(predicted(WIDTH, processes, parallel, SMALL).total)


def predicted(tokens: int, processes: int, parallel: str | None, case: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    from temper.models.methods import Adapter
    from temper.scaling import footprint

    adapter = Adapter(**case["adapter"]) if "adapter" in case else None
    setting = footprint.Setting(
        tokens=tokens, width=WIDTH, scored=0.5, passes=case.get("passes", 1), adapter=adapter,
        recompute=case.get("activation_checkpointing", False), optimizer=case.get("optimizer", "adamw"),
    )  # fmt: skip
    return footprint.of(lambda: AutoModelForCausalLM.from_config(config(case["hidden"], case["layers"])), setting, parallel, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a micro-batch")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "footprints.json")
    asked = parser.parse_args()
    out: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    anyway = {way: taken_anyway(way) for way in asked.ways}
    out["taken_anyway_bytes"] = anyway
    print({way: f"{size / 1e6:.0f} MB" for way, size in anyway.items()}, flush=True)
    for name in asked.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            saved(Path(folder), case["hidden"], case["layers"])
            for way in asked.ways:
                processes, parallel = WAYS[way]
                told = predicted(asked.tokens, processes, parallel, case)
                real = measured(Path(folder), asked.tokens, processes, parallel, case) - anyway[way]
                out[f"{name}/{way}"] = {"predicted_bytes": round(told.total), "measured_bytes": real, "parts": {k: round(v) for k, v in vars(told).items()}, "case": {**case, "tokens": asked.tokens}}  # fmt: skip
                print(f"{name}, {way}: predicted {told.total / 1e6:.0f} MB, measured {real / 1e6:.0f} ({told.total / real - 1:+.0%})", {k: round(v / 1e6) for k, v in vars(told).items()}, flush=True)
                asked.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
