"""The card that `gpu.py` runs on: its shapes of models, its clock, its memory, its file of results."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench
import shapes
import torch

QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "dry": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 4096},
}  # fmt: skip


@dataclasses.dataclass
class Bench:
    """One run: its machine, its time, its file."""

    device: torch.device
    dry: bool
    until: float
    file: Path
    folder: Path
    facts: dict[str, Any]
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)

    def write(self, found: dict[str, Any] | None = None) -> None:
        if found is not None:
            print(f"  {found['name']} against {found['against']}: {told(found)}", flush=True)
            self.facts["order"] = [*self.facts.get("order", []), [found["name"], found["against"]]]
        entry = found or {"name": None, "against": None}
        bench.write(self.file, self.facts, entry, [tuple(x) for x in self.facts.get("order", [])])

    def take(self, shape: str) -> str:
        """Make the harness's model this one; returns its name."""
        shape = "dry" if self.dry else shape

        def config(layers: int = 0) -> Any:
            from transformers import Qwen2Config

            return Qwen2Config(
                **SHAPES[shape], num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
                eos_token_id=shapes.END,
            )  # fmt: skip

        shapes.config = config
        base = self.folder / shape
        if not base.exists():
            from transformers import Qwen2ForCausalLM

            torch.manual_seed(0)
            with self.device:
                Qwen2ForCausalLM(config()).bfloat16().save_pretrained(base)
            shapes.tokenizer().save_pretrained(base)
        os.environ["TEMPER_BENCH_BASE"] = str(base)
        return shape

    def synchronised(self, do: Callable[[], Any]) -> float:
        """Seconds."""
        self.wait()
        began = time.perf_counter()
        do()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self, *, reset: bool = False) -> int:
        """Bytes of the card in use, at most since the last reset."""
        if self.device.type != "cuda":
            return 1
        if reset:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()


def told(found: dict[str, Any]) -> str:
    asked = f", asked {found['asked']:g}" if found["asked"] else ""
    return (
        f"{found['seconds']['temper']:.3f} and {found['seconds']['other']:.3f} s: {found['time_ratio']['median']:.2f} times as "
        f"fast{asked}; memory {found['memory_ratio']:.2f}; {found['peak_share']:.0%} of the peak; loss difference "
        f"{found['loss_difference']:.1e}"
    )


def machine(device: torch.device, peaks: dict[str, float]) -> dict[str, Any]:
    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = device.type == "cuda"
    names = ("torch", "transformers", "peft", "trl", "triton", "flash_attn")
    return {
        "processor": torch.cuda.get_device_name(device) if cuda else bench._processor("model name"),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None, "python": platform.python_version(),
        "versions": {n: of(n) for n in names}, "peak_gflops": {k: round(v / 1e9) for k, v in peaks.items()},
        "left_out": {}, "failed": {},
    }  # fmt: skip


def peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of random matrices, the median of nine."""
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    b = Bench(device, False, 0, Path(), Path(), {})
    for _ in range(3):
        x @ y
    return 2 * size**3 / statistics.median(b.synchronised(lambda: x @ y) for _ in range(9))


def unpacked(folder: Path, into: Path) -> None:
    """Put the wheels of a folder before what is installed."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as inside:
            inside.extractall(into)
    sys.path.insert(0, str(into))
    importlib.invalidate_caches()
