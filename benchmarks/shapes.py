"""The model and the rows that all workloads share: Qwen2's shape, 40 million parameters, random weights, words as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY, END, FIRST = 32_000, 2, 4  # the end token; the first token that is a word
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ADAPTER = {"r": 8, "alpha": 16}  # the same in a recipe


def word(i: int) -> str:
    """Special tokens are found inside words too: theirs begin no other's."""
    return f"w{i}" if i >= FIRST else f"<{i}>"


def text(ids: list[int]) -> str:
    return " ".join(map(word, ids))


def tokenizer() -> Any:
    """w5 is token 5; texts are split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(3)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=word(0), bos_token=word(1), eos_token=word(END))


def config(layers: int = 8) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=END,
    )  # fmt: skip


def saved(folder: Path, *, layers: int = 8) -> Path:
    """The model with its tokenizer in a folder, made once."""
    from transformers import Qwen2ForCausalLM

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config(layers)).float().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def warm(model: Any, spread: float = 0.02) -> None:
    """Draw LoRA's A, and B, zero at its start, the same on both sides: a policy that is not its reference."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(spread * torch.randn(p.shape, generator=draw))


def cool(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()


def lognormal(n: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer, together 180 tokens on average, log-normal, the answer about a third; it ends with the end token."""
    draw = np.random.default_rng(0)
    sigma = 0.6
    lengths = np.clip(np.exp(draw.normal(np.log(180) - sigma**2 / 2, sigma, n)), 16, 1000).astype(int)
    out = []
    for length in lengths.tolist():
        answer = max(4, int(length * draw.uniform(0.2, 0.5)))
        ids = draw.integers(FIRST, VOCABULARY, length - 1).tolist()
        out.append((ids[: length - answer], [*ids[length - answer :], END]))
    return out


def pairs(n: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt of 250 to 310 tokens, chosen, rejected of 16 to 150; both end with the end token."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(FIRST, VOCABULARY, draw.integers(low, high)).tolist()  # type: ignore[no-any-return]

    return [(ids(250, 311), [*ids(15, 150), END], [*ids(15, 150), END]) for _ in range(n)]


def operations(tokens: int, scored: int, pairs_seen: float, *, full: bool) -> float:
    """Floating-point operations of a training step: 2 a weight and token forward, as many for the gradients of
    activations, and as many for those of weights where all are trained; attention 4 a dimension, layer and pair of tokens
    that sees one another (twice that backward); the head only where it is scored."""
    c = config()
    layers = c.num_hidden_layers
    head = c.hidden_size // c.num_attention_heads
    layer = c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * head + 3 * c.intermediate_size)
    weights = tokens * layers * layer + scored * c.vocab_size * c.hidden_size
    return (6 if full else 4) * weights + 3 * 4 * c.hidden_size * layers * pairs_seen
