"""Where and in which precision the arithmetic runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from temper.errors import ModelError, RecipeError
from temper.models import products

if TYPE_CHECKING:
    from temper.recipe import Recipe

Precision = Literal["auto", "float32", "bf16", "fp16"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of(recipe: Recipe) -> torch.device:
    """The device of a recipe, set up for its stages (see `setup`)."""
    halves = any(getattr(stage, "precision", None) == "bf16" for stage in recipe.stages.values())
    return setup(recipe.device, recipe.threads, halves=halves)


def setup(wanted: str, threads: int | None, *, halves: bool = False) -> torch.device:
    """Choose the device, set the threads, and make arithmetic repeatable.

    Args:
        halves: products in bf16 will be made, not in float32 alone. What is set first in a process stays.

    Raises:
        RecipeError: a device that this machine lacks.
    """
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums only so
    # oneDNN keeps a compiled kernel, with its buffers, for each of the last 1024 shapes, and torch's bridge to it as many.
    # Beside a model of 40 million parameters that is a gigabyte and more, up to 11 MB each, between which tensors find
    # their place less well; and no time is saved over these. (With 32, LoRA in bf16 would take a fifth more time.)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64" if halves else "32")
    keep_memory()
    torch.set_autocast_cache_enabled(True)
    products.by_onednn(True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over all memory
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device «{wanted}» cannot be used: {str(error).splitlines()[0][:120]}",
            do="device: auto takes what is there",
        ) from None
    return device


def keep_memory(keep: bool = True) -> None:
    """Have glibc's allocator keep what tensors leave, for the next ones, instead of giving it back to the system.

    Each piece that comes back anew is zeroed by the system page by page: of attention's plain products, whose scores are
    megabytes each, that was half the time and more. Elsewhere nothing changes.

    Args:
        keep: False gives every piece of a quarter of a megabyte back at once. The heap then has no holes between tensors,
            which beside a base of 100 million parameters in 4 bits (54 MB) were some 200 MB; a step takes up to twice
            as long there, less where matrices are larger.
    """
    settings = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
    if not keep:
        settings = {M_MMAP_THRESHOLD: 2**18, M_TRIM_THRESHOLD: 2**16, M_MMAP_MAX: 2**20}
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        allocator = ctypes.CDLL(None)
        for setting, value in settings.items():
            allocator.mallopt(setting, value)


CPUINFO = Path("/proc/cpuinfo")
# instructions by which a processor computes in half precision: x86, and ARM's names
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def precision(wanted: Precision, device: torch.device) -> str:
    """`auto` is bf16 where a GPU computes in it, else float32: a CPU's results should not depend on its extensions.

    Raises:
        ModelError: fp16 or bf16 that the device lacks.
    """
    if wanted == "auto":
        return (
            "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        )
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError("this GPU does not compute in bf16", do="precision: fp16 or float32")
    return wanted


def emulated(kind: str, device: torch.device) -> str | None:
    """A sentence where a processor has no instructions for a precision, so that it saves no time; None where it has, or
    where that cannot be told."""
    flags = _flags() if device.type == "cpu" else frozenset()
    if kind == "float32" or not flags or flags & NATIVE[kind]:
        return None
    return f"this processor does not compute in {kind} itself: it is emulated, and slower than precision: float32"


def _flags() -> frozenset[str]:
    """What Linux says that the first core can do."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    line = next((x for x in lines if x.split(":")[0].strip() in ("flags", "Features")), ":")
    return frozenset(line.split(":")[1].split())


def autocast(device: torch.device, kind: str) -> Any:
    """Mixed precision for the forward pass; nothing at float32."""
    if kind == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[kind])


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of the GPU's memory since the last reset; None on a CPU, whose memory the pipeline watches."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
