"""Bases held in 4 or 8 bits while an adapter trains on them (QLoRA: Dettmers et al. 2023), by bitsandbytes.

An adapter belongs to the base that it was trained on, rounding included. So its note says how that base was held, and
whoever opens the adapter gets that base again: one in 4 bits on a processor with the rounded weights written out in full,
which gives the same function faster; else packed, for in 8 bits what goes into a layer is rounded too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from temper.errors import ModelError

Held = Literal["nf4", "int8"]
# Of a weight, scales included (Dettmers et al. 2023, section 3: 0.127 bits a weight in NF4).
BYTES: dict[Held | None, float] = {None: 4.0, "nf4": (4 + 0.127) / 8, "int8": 1.0}
MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4


def configuration(held: Held, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers loads a base so: NF4 with its scales quantised too, or LLM.int8 (Dettmers et al. 2022).

    Args:
        dtype: what products are computed in.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"a base in {held} needs bitsandbytes", do="pip install 'temper-lm[bnb]', or leave quantize out"
        )
    if held == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@contextlib.contextmanager
def lightly() -> Iterator[None]:
    """Within, a weight's pages of its file are given back once it is rounded, and what rounding it left in the heap.

    transformers maps safetensors files into memory, and what was read of a mapping counts as this process's until the last
    tensor on it is gone: a base of 4 bits would begin with the memory of one in 32. Only mappings that are made within are
    touched: nobody has written into them, and the loader holds them as long as it rounds.
    """
    import bitsandbytes

    package: Any = bitsandbytes
    functions, there = package.functional, _mapped()
    before = functions.quantize_4bit, functions.int8_vectorwise_quant

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(*given: Any, **how: Any) -> Any:
            out = function(*given, **how)
            for start, end in _mapped() - there:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
            trim()
            return out

        return rounded

    functions.quantize_4bit, functions.int8_vectorwise_quant = map(after, before)
    try:
        yield
    finally:
        functions.quantize_4bit, functions.int8_vectorwise_quant = before


def _mapped() -> set[tuple[int, int]]:
    """Where files of weights are mapped; the hub's cache keeps them under names without an ending."""
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    files = (line.split()[0].split("-") for line in lines if line.endswith(".safetensors") or "/blobs/" in line)
    return {(int(start, 16), int(end, 16)) for start, end in files}


def trim() -> None:
    """What the heap holds free goes back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def on_its_own(base: PreTrainedModel) -> PreTrainedModel:
    """What was not rounded in memory of its own, so that the files are let go."""
    with torch.no_grad():
        for tensor in (*base.parameters(), *base.buffers()):
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.data = tensor.data.clone()
    gc.collect()
    trim()
    return base


def as_trained(base: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from laying weights out anew on processors with bf16, at the first pass without gradients: the products
    that it then makes are rounded to bf16, and have no gradient."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return base


def written_out(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its rounded weights in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are rounded is what is meant
        out: PreTrainedModel = base.dequantize(dtype)
    # transformers goes on to take it for a quantised one, which it would not save as what it is
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(out, name):
            delattr(out, name)
    vars(out.config).pop("quantization_config", None)
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(out, flag):
            setattr(out, flag, False)
    return out


def count(parameter: torch.nn.Parameter) -> int:
    """Weights that a parameter holds: of one in 4 bits, two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
