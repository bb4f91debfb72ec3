"""What is watched beside the loss: the noise of the gradient's norm, and what the run takes of the machine.

The noise is a function of the steps and part of each checkpoint. What the machine says is told and decides nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import psutil
import torch

WINDOW = 20  # steps that the running mean and variance look back, about


def follow(noise: dict[str, float], norm: float) -> dict[str, float]:
    """The running mean and variance of the gradient's norm after one more step.

    Exponentially weighted, by Finch 2009 ("Incremental calculation of weighted mean and variance", equations 124 and
    143), the weight of a new step being 1/20, of the first twenty 1/n: there it is the plain mean and variance.

    >>> a = follow(follow({}, 1.0), 3.0)
    >>> a["mean"], a["variance"], noise_of(a)
    (2.0, 1.0, {'grad_noise': 0.5})
    """
    n = noise.get("steps", 0) + 1
    if not math.isfinite(norm):  # loss scaling skips such a step
        return noise
    mean, variance, weight = noise.get("mean", 0.0), noise.get("variance", 0.0), max(1 / n, 1 / WINDOW)
    difference = norm - mean
    step = weight * difference
    return {"steps": n, "mean": mean + step, "variance": (1 - weight) * (variance + difference * step)}


def noise_of(noise: dict[str, float]) -> dict[str, float]:
    """grad_noise: standard deviation of the gradient's norm over its mean; nothing before the second step."""
    if noise.get("steps", 0) < 2 or not noise["mean"] > 0:
        return {}
    return {"grad_noise": math.sqrt(max(0.0, noise["variance"])) / noise["mean"]}


class Machine:
    """What this process takes of the machine, and the GPU's own figures where nvidia-ml-py finds one."""

    def __init__(self, device: torch.device) -> None:
        self.process = psutil.Process()
        self.clocks = time.process_time(), time.perf_counter()
        self.nvml, self.handle = _gpu(device)

    def __call__(self) -> dict[str, float]:
        """cpu_percent (of one core: two busy cores are 200) since the last call, memory_gb of this process, and of a GPU
        gpu_percent and gpu_memory_gb, of all that runs on it."""
        # by process_time, as psutil counts in ticks of 10 ms, which are nothing in a short step
        before, self.clocks = self.clocks, (time.process_time(), time.perf_counter())
        busy, took = (now - then for now, then in zip(self.clocks, before, strict=True))
        out = {"cpu_percent": round(100 * busy / took, 1), "memory_gb": round(self.process.memory_info().rss / 1e9, 3)}
        if self.nvml is not None:
            with contextlib.suppress(self.nvml.NVMLError):  # some figures are withheld in containers
                out["gpu_percent"] = float(self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu)
                out["gpu_memory_gb"] = round(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used / 1e9, 3)
        return out


def _gpu(device: torch.device) -> tuple[Any, Any]:
    """NVIDIA's management library and the GPU in it; nothing where either is missing."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml  # type: ignore[import-not-found]  # of nvidia-ml-py, the extra «gpu»
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # by its UUID: CUDA_VISIBLE_DEVICES numbers GPUs anew, NVML does not
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None, None


def shown(line: dict[str, Any]) -> dict[str, str]:
    """What the progress bar says of a logged line."""
    noise = f"±{line['grad_noise']:.0%}" if "grad_noise" in line else ""
    out = {"loss": f"{line['loss']:.3f}", "lr": f"{line['lr']:.1e}"}
    if line.get("grad_norm") is not None:
        out["norm"] = f"{line['grad_norm']:.2g}{noise}"
    out["tok/s"] = f"{line['tokens_per_second']:.0f}"
    out["cpu"] = f"{line['cpu_percent']:.0f}% {line['memory_gb']:.1f}GB"
    if "gpu_percent" in line:
        out["gpu"] = f"{line['gpu_percent']:.0f}% {line['gpu_memory_gb']:.1f}GB"
    return out
