"""The sampler beside transformers' `generate`: 32 completions of 64 tokens, prompts of 613 tokens (4 × 8) and of 32.

    python benchmarks/rollouts.py [--threads 2] [--rounds 3] [--tokens 64]

A model of 40 million parameters in Qwen2's shape with random weights, float32, sampling at temperature 1, no end token.
Both take turns, so that whatever else the machine does falls on both; the ratios' median and range are what counts.
Run it on an idle machine: with two threads, any third busy one slows both manyfold, and not alike.
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from turns import in_turns

from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler


class NoTokenizer:
    """Nothing is decoded to text here."""

    pad_token_id = 0


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def compare(hf: PreTrainedModel, length: int, prompts: int, completions: int, tokens: int, rounds: int) -> None:
    """Alternate both on the same prompts and print what came out."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 32_000, (prompts, length), generator=draw)
    repeated = ids.repeat_interleave(completions, 0)
    sampler = Sampler(hf, NoTokenizer(), end_ids=[])
    assert sampler.layout == "native", sampler.reason

    def ours(n: int) -> None:
        answers = sampler.sample(ids.tolist(), Decoding(max_new_tokens=n, temperature=1.0), completions=completions)
        assert all(len(c.ids) == n for some in answers for c in some)

    @torch.no_grad()
    def theirs(n: int) -> None:
        out = hf.generate(
            input_ids=repeated, attention_mask=torch.ones_like(repeated), max_new_tokens=n, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == length + n

    ours(4), theirs(4)  # what is done once is not timed
    what = f"{prompts} prompts of {length} × {completions} completions of {tokens}"
    in_turns(what, ("sampler", lambda: ours(tokens)), ("generate", lambda: theirs(tokens)), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    hf = model()
    print(
        f"{sum(p.numel() for p in hf.parameters()) / 1e6:.1f} M parameters, {asked.threads} threads, torch {torch.__version__}"
    )
    compare(hf, 613, 4, 8, asked.tokens, asked.rounds)
    compare(hf, 32, 32, 1, asked.tokens, asked.rounds)


if __name__ == "__main__":
    main()
