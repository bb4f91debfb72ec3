"""Bases held in 4 or 8 bits while an adapter trains on them (QLoRA: Dettmers et al. 2023), by bitsandbytes.

An adapter belongs to the base that it was trained on, rounding included. So its note says how that base was held, and
whoever opens the adapter gets that base again: one in 4 bits on a processor with the rounded weights written out in full,
which gives the same function faster; else packed, for in 8 bits what goes into a layer is rounded too.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from temper.errors import ModelError

Held = Literal["nf4", "int8"]


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
