"""What the machine can do at best: products of large square matrices, by MKL and by oneDNN."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def measured(precision: str, size: int = 2048, rounds: int = 7) -> float:
    """Floating-point operations a second, the better of the libraries."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        x, w = a.to_mkldnn(), b.to_mkldnn()
        ways.append(lambda: torch._C._nn.mkldnn_linear(x, w))  # type: ignore[attr-defined]
    return max(2 * size**3 / _median(way, rounds) for way in ways)


def _median(way: Callable[[], object], rounds: int) -> float:
    way()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        way()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    for kind in ("float32", "bf16"):
        print(f"{kind}: {measured(kind) / 1e9:.0f} GFLOP/s with {torch.get_num_threads()} threads")
