"""Data preparation: 200,000 rows of a prompt and an answer, as messages, on their way to the first step: written out by a
chat template, tokenised, masked and packed. Reading the file is left out on both sides.

The rows are words that are made up, drawn as often as words are in texts (Zipf); the tokenizer is a byte-level BPE of
4,000 pieces, trained on a part of them. Its chat template has the form of Llama 3's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from contest import BATCH, Contest, Settings, Side

ROWS, PIECES, LENGTH = 200_000, 4000, 1024  # rows; entries of the tokenizer; tokens of a packed row, TRL's default
SPECIAL = ["<|end|>", "<|start|>", "<|says|>"]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|says|>\n\n{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|says|>\n\n{% endif %}"
)


def rows(n: int) -> list[dict[str, Any]]:
    """Rows of 20 to 60 words, the answer a quarter to half of them."""
    draw = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = np.array(["".join(draw.choice(syllables, draw.integers(1, 5))) for _ in range(20_000)])
    share = 1 / np.arange(10, len(words) + 10)
    lengths = draw.integers(20, 61, n)
    stream = iter(np.split(draw.choice(words, lengths.sum(), p=share / share.sum()), np.cumsum(lengths)[:-1]))
    out = []
    for length, part in zip(lengths.tolist(), draw.uniform(0.5, 0.75, n).tolist(), strict=True):
        said, at = next(stream).tolist(), int(length * part)
        out.append(
            {"prompt": [_message("user", said[:at], "?")], "completion": [_message("assistant", said[at:], ".")]}
        )
    return out


def _message(role: str, words: list[str], mark: str) -> dict[str, str]:
    return {"role": role, "content": " ".join(words).capitalize() + mark}


def tokenizer(examples: list[dict[str, Any]]) -> Any:
    """A byte-level BPE of the first rows' words, made once in a contest and read by both sides."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(os.environ["TEMPER_BENCH_BASE"]).parent / "pieces"
    if not folder.is_dir():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=PIECES, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        made.train_from_iterator((m["content"] for e in examples[:5000] for part in e.values() for m in part), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token=SPECIAL[0], pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:],
            chat_template=TEMPLATE,
        ).save_pretrained(folder)  # fmt: skip
    return PreTrainedTokenizerFast.from_pretrained(folder)


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    examples = rows(int(os.environ.get("TEMPER_BENCH_ROWS", asked.pop("rows", ROWS))))
    return Temper(examples) if which == "temper" else Trl(folder, examples, asked)


class Prepared:
    """What the stage `sft` does between reading its rows and its first step."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        from temper.types import Record

        self.tokenizer = tokenizer(examples)
        self.records = [Record(row, f"rows.jsonl:{k}") for k, row in enumerate(examples, 1)]

    def prepared(self) -> Any:
        from temper.data.chat import Encoder
        from temper.data.forms import Format
        from temper.engine.batches import Batches
        from temper.stages.sft import fitted, in_chains

        encoder = Encoder(self.tokenizer, Format())
        trees, _ = fitted(in_chains(encoder, self.records)[0], LENGTH, "error")
        return Batches(trees, BATCH, row_tokens=LENGTH, micro_tokens=8 * LENGTH, seed=0)


class Temper(Prepared):
    """The same, and the micro-batches of an epoch."""

    flops = 0.0

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        super().__init__(examples)
        self.epoch()
        self.tokens = int(self.batches.trees.sizes.sum())

    def epoch(self) -> None:
        self.batches = self.prepared()
        self.scored = sum(len(row.tgt) for k in range(self.batches.per_epoch) for row in self.batches.rows(k))

    def loss(self) -> float:
        """Tokens that are trained on."""
        return float(self.scored)


class Trl:
    """What SFTTrainer does with a data set before it trains."""

    tokens, flops = 0, 0.0

    def __init__(self, folder: Path, examples: list[dict[str, Any]], settings: Settings) -> None:
        import datasets
        import trl_side
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from trl import SFTConfig, SFTTrainer

        datasets.disable_caching()  # else only the first epoch would prepare anything
        pieces = tokenizer(examples)
        self.rows = datasets.Dataset.from_list(examples)
        small = Qwen2Config(
            vocab_size=len(pieces), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        self.config = SFTConfig(packing=True, max_length=LENGTH, **trl_side.arguments(folder, settings))
        self.trainer = SFTTrainer(
            model=Qwen2ForCausalLM(small), args=self.config, processing_class=pieces, train_dataset=self.rows.select(range(8))
        )  # fmt: skip
        self.pieces = pieces

    def epoch(self) -> None:
        self.ready = self.trainer._prepare_dataset(self.rows, self.pieces, self.config, True, None, "train")

    def loss(self) -> float:
        if not hasattr(self, "ready"):
            self.epoch()
        columns = self.ready.with_format("arrow")
        return float(
            sum((batch["labels"].combine_chunks().flatten().to_numpy() != -100).sum() for batch in columns.iter(1000))
        )


CONTESTS = [
    Contest("preparation", "TRL SFTTrainer as documented", made, asked=2, weights=False),
    Contest(
        "preparation",
        "TRL SFTTrainer tuned",
        made,
        grid=({}, {"dataset_num_proc": 2}),
        some={"rows": 20_000},
        weights=False,
    ),
]
