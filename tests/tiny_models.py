"""Tiny models of many families with random weights, sharp enough that an error shows: log-probabilities spread by more
than a nat, windows shorter than the paths."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from temper.models import adapters

VOCABULARY = 96
WINDOW = 8

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_NO_GROUPS = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_GPT = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# family → (model type, settings)
TREES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "qwen2 mixed": (
        "qwen2",
        {**_COMMON, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 8}),
    "gemma3": (
        "gemma3_text",
        {**_COMMON, "num_hidden_layers": 3, "layer_types": _MIXED, "sliding_window": WINDOW, "head_dim": 8,
         "query_pre_attn_scalar": 8},
    ),
    "gemma2": (
        "gemma2",
        {**_COMMON, "num_hidden_layers": 2, "sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "attn_implementation": "eager"},
    ),
    "gpt2": ("gpt2", {**_GPT, **_NO_DROPOUT_GPT2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**_NO_GROUPS, "rotary_pct": 0.5}),
    "opt": (
        "opt",
        {**_GPT, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0},
    ),
    "mistral": ("mistral", {**_COMMON, "sliding_window": WINDOW}),
    "phi3": ("phi3", {**_COMMON, "sliding_window": None}),
    "cohere2": (
        "cohere2",
        {**_COMMON, "num_hidden_layers": 3, "layer_types": _MIXED, "sliding_window": WINDOW, "logit_scale": 1.0,
         "tie_word_embeddings": True},
    ),
    "granite": (
        "granite",
        {**_COMMON, "logits_scaling": 1.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
         "attention_multiplier": 0.4},
    ),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "olmo2": ("olmo2", _COMMON),
    "stablelm": ("stablelm", _COMMON),
    "falcon rope": (
        "falcon", {**_NO_GROUPS, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
    ),
}  # fmt: skip

# Models that would be wrong on trees without an error.
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {**_GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {**_GPT, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "gpt_neo": (
        "gpt_neo",
        {**_GPT, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128,
         "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "falcon alibi": ("falcon", {**_NO_GROUPS, "alibi": True, "new_decoder_architecture": False}),
    "mamba": ("mamba", {**_GPT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": (
        "lfm2", {**_COMMON, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_dim": 32,
                 "block_ff_dim": 48},
    ),
    "xlnet": ("xlnet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
}  # fmt: skip

_LINES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_T5 = {**_LINES, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_BART = {
    **_LINES, "bos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None, "d_model": 32,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "dropout": 0.0,
}  # fmt: skip

# Encoder–decoders.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5 gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("umt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", _BART),
    "pegasus": ("pegasus", {**_BART, "scale_embedding": True, "decoder_start_token_id": 0}),
}

# Encoders that transformers loads as causal models all the same.
LOOK_AHEAD: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (
        kind,
        {
            **_GPT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
        },
    )
    for kind in ("bert", "roberta")
}
LOOK_AHEAD["xlnet"] = PADDED.pop("xlnet")


def build(family: str, *, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A model of one family in evaluation mode."""
    kind, settings = (TREES | PADDED | LOOK_AHEAD | LINES)[family]
    settings = dict(settings)
    attention = settings.pop("attn_implementation", None) or attention
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    how = {"attn_implementation": attention} if attention else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = made.from_config(config, **how)
    sharpen(model, seed)
    return model.eval()


def sharpen(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights of a size that a trained model has: a fresh one is so flat that a wrong mask hardly shows."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point() and "A_log" not in name:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw * 1.5 / parameter.shape[-1] ** 0.5)
            elif "A_log" not in name and "dt_" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def warmed(model: Any, spread: float) -> Any:
    """The model with adapters that already do something: LoRA's B, zero at its start, is drawn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return model


def attach_warm(monkeypatch: Any, spread: float) -> None:
    """Stages attach such adapters from here on."""
    real = adapters.attach
    monkeypatch.setattr(adapters, "attach", lambda *given, **more: warmed(real(*given, **more), spread))
