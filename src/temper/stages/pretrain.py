"""pretrain: a tokenizer and a small language model from a corpus, on this machine."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.engine import device as devices
from temper.engine.batches import Batches
from temper.engine.examples import pieces_of
from temper.engine.loop import Loop
from temper.engine.settings import Validated
from temper.errors import DataError
from temper.job import Job
from temper.losses import nll
from temper.models import load
from temper.models.scores import Policy
from temper.recipe import Config, DataRef, Stage, detail, stages
from temper.stages.training import read_split, settle, summarise
from temper.trees import chain, rows_of
from temper.types import Record


class Shape(Config):
    """A small Llama."""

    vocabulary: int = detail(4000, "Pieces of the tokenizer (byte-level BPE), special tokens included.", ge=300)
    hidden: int = detail(256, "Width of the residual stream.", ge=16)
    layers: int = detail(4, "Transformer blocks.", ge=1)
    heads: int = detail(4, "Attention heads.", ge=1)
    intermediate: int | None = detail(None, "Width of the feed-forward part; null: 8/3 of hidden, rounded up to 32.")
    context: int = detail(512, "Longest sequence in tokens.", ge=16)


@stages.register("pretrain")
class Pretrain(Stage, Validated):
    """Train a byte-level BPE tokenizer and a small Llama on the column `text` of a data stage."""

    kind = "pretrain"
    version = 2
    gives = "model"
    trains_on = ("train", "validation")

    data: DataRef = detail(..., "A data stage whose rows have a column «text».")
    shape: Shape = detail(Shape(), "Size of the model and of its tokenizer.")
    lr: float = detail(2e-3, "Peak learning rate.", gt=0)
    weight_decay: float = detail(0.05, "Decoupled weight decay of matrices.", ge=0)

    def run(self, job: Job) -> None:
        records = texts(job, self.data, "train")
        made = job.dir / "tokenizer"
        if not made.is_dir():
            job.say(f"training a tokenizer of {self.shape.vocabulary} pieces on {len(records):,} texts")
            beside = job.dir / ".tokenizer.tmp"  # a kill between its files must not leave half a tokenizer
            shutil.rmtree(beside, ignore_errors=True)
            train_tokenizer([r.row["text"] for r in records], self.shape).save_pretrained(beside)
            os.rename(beside, made)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
        device = devices.setup(job.recipe.device, job.recipe.threads)
        precision = devices.precision(self.precision, device)
        policy = Policy(fresh(self.shape, tokenizer, job.seed).to(device))  # type: ignore[arg-type]
        if self.activation_checkpointing:
            policy.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trees = [t for r in records for t in blocks(tokenizer, r, self.shape.context)]
        validation = [
            t
            for r in texts(job, self.data, "validation", optional=True)
            for t in blocks(tokenizer, r, self.shape.context)
        ]
        settle(job, policy, "auto", max(t.depth for t in trees), device, precision)
        batches = Batches(trees, self.batch_size * self.accumulation, self.row_tokens, self.micro_tokens, job.seed)
        held = rows_of(validation, self.row_tokens, self.micro_tokens)
        loop = Loop(job, policy, nll, batches, self, precision, held, pieces=pieces_of(tokenizer))
        job.counts["examples"] = len(trees)
        lines = [f"rows: {len(records):,} texts in {len(trees):,} sequences of at most {self.shape.context} tokens"]
        summarise(job, loop, lines, trees, f"⟦{tokenizer.decode(trees[0].ids.tolist())[:300]}…⟧")
        loop.run()
        load.save(policy.hf, tokenizer, job.dir / "model", ends={tokenizer.eos_token_id})


def texts(job: Job, ref: str, split: str, *, optional: bool = False) -> list[Record]:
    """Rows of a data stage that have a column `text`."""
    records = read_split(job, ref, split, optional=optional)
    if records and "text" not in records[0].row:
        raise DataError(
            f"pretraining reads a column «text»; {ref} has {', '.join(records[0].row)}",
            do='map it in the data stage: text: "{column}"',
        )
    return records


def train_tokenizer(corpus: list[str], shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, nothing is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<pad>", "<bos>", "<eos>"]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=shape.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=shape.context
    )


def fresh(shape: Shape, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, a function of the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate or -(-shape.hidden * 8 // 3 // 32) * 32,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def blocks(tokenizer: Any, record: Record, context: int) -> list[Any]:
    """A text → one sequence, or several of at most `context` tokens where it is longer; the last ends with the end token."""
    ids = [*tokenizer(record.row["text"])["input_ids"], tokenizer.eos_token_id]
    return [
        chain(part, [1.0] * len(part), record.where)
        for k in range(0, len(ids), context)
        if len(part := ids[k : k + context]) > 1
    ]
