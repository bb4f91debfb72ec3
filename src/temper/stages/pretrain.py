"""pretrain: a tokenizer and a small language model from a corpus, on this machine."""

from __future__ import annotations

import os
import shutil
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

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
from temper.stages.beforehand import summarise
from temper.stages.denoise import Corrupting, Texts, sentinels
from temper.stages.training import read_split, settle
from temper.trees import Tree, chain, rows_of
from temper.types import Record

SENTINEL = "<extra_id_"


class Shape(Config):
    """A small Llama, or a small T5."""

    family: Literal["llama", "t5"] = detail(
        "llama", "llama: decoder-only, predicts what comes next; t5: encoder–decoder, fills in what was taken out."
    )
    vocabulary: int = detail(4000, "Pieces of the tokenizer (byte-level BPE), special tokens included.", ge=300)
    hidden: int = detail(256, "Width of the residual stream.", ge=16)
    layers: int = detail(4, "Transformer blocks; of a t5 in encoder and decoder each.", ge=1)
    heads: int = detail(4, "Attention heads.", ge=1)
    intermediate: int | None = detail(
        None, "Width of the feed-forward part, which is gated; null: 8/3 of hidden, rounded up to 32."
    )
    context: int = detail(512, "Longest sequence in tokens.", ge=16)


@stages.register("pretrain")
class Pretrain(Stage, Validated):
    """Train a byte-level BPE tokenizer and a small Llama or T5 on the column `text` of a data stage."""

    kind = "pretrain"
    version = 2
    gives = "model"
    together = True
    trains_on = ("train", "validation")

    data: DataRef = detail(..., "A data stage whose rows have a column «text».")
    shape: Shape = detail(Shape(), "Size of the model and of its tokenizer.")
    writes: Literal["spans", "text"] = detail(
        "spans",
        "Of a t5, whose encoder reads texts with spans taken out: the decoder writes these, or the whole text, by which it "
        "learns to copy sooner.",
    )
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
        device = devices.of(job.recipe)
        precision = devices.precision(self.precision, device)
        policy = Policy(fresh(self.shape, tokenizer, job.seed).to(device))  # type: ignore[arg-type]
        if (attention := load.suited(policy.inner.config, "auto", device)) != "auto":
            policy.inner.set_attn_implementation(attention)
        if self.activation_checkpointing:
            policy.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        held = texts(job, self.data, "validation", optional=True)
        trees, validation, drawn = self._trees(tokenizer, records, held, job.seed)
        settle(job, policy, "auto", max(t.depth for t in trees), device, precision)
        lane = policy.lane(self.row_tokens)
        size = self.batch_size * self.accumulation
        batches = Batches(trees, size, lane, self.micro_tokens, job.seed)
        if drawn:
            batches = Corrupting(trees, size, lane, self.micro_tokens, job.seed, texts=drawn)
        rows = rows_of(validation, lane, self.micro_tokens)
        loop = Loop(job, policy, nll, batches, self, precision, rows, pieces=pieces_of(tokenizer))
        job.counts["examples"] = len(trees)
        lines = [f"rows: {len(records):,} texts in {len(trees):,} sequences of at most {self.shape.context} tokens"]
        first = trees[0].ids.tolist()
        asked, trained = (tokenizer.decode(ids)[:300] for ids in (first[: trees[0].root], first[trees[0].root :]))
        summarise(job, loop, lines, trees, f"{asked} … ⟦{trained}⟧" if drawn else f"⟦{asked}{trained}…⟧")
        loop.run()
        load.save(policy.hf, tokenizer, job.dir / "model", ends={tokenizer.eos_token_id})

    def _trees(
        self, tokenizer: Any, records: list[Record], held: list[Record], seed: int
    ) -> tuple[list[Tree], list[Tree], Texts | None]:
        """Examples, those for validation, and, of a T5, what draws them anew for every epoch."""
        context = self.shape.context
        if self.shape.family == "llama":
            made = [[t for r in some for t in blocks(tokenizer, r, context)] for some in (records, held)]
            return made[0], made[1], None
        sentinel = [
            i for t, i in sorted(tokenizer.get_added_vocab().items(), key=lambda e: e[1]) if t.startswith(SENTINEL)
        ]
        kept = []
        for some in (records, held):
            pieces = [(part, r.where) for r in some for part in parts(tokenizer, r, context)]
            ids, origins = [part for part, _ in pieces], [where for _, where in pieces]
            kept.append(Texts(ids, origins, sentinel, tokenizer.eos_token_id, seed, self.writes == "text"))
        train, validation = ([t.tree(i, 0) for i in range(len(t.ids))] for t in kept)
        return train, validation, kept[0]


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
    t5 = shape.family == "t5"
    marks = [f"{SENTINEL}{k}>" for k in range(sentinels(shape.context))] if t5 else []
    special = ["<pad>", "<eos>", *marks] if t5 else ["<pad>", "<bos>", "<eos>"]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=shape.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    form, mark = ("$A <eos>", "<eos>") if t5 else ("<bos> $A", "<bos>")
    bpe.post_processor = processors.TemplateProcessing(single=form, special_tokens=[(mark, 1)])  # type: ignore[assignment]
    more: dict[str, Any] = {"extra_special_tokens": marks} if t5 else {"bos_token": "<bos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=shape.context, **more
    )


def fresh(shape: Shape, tokenizer: Any, seed: int) -> LlamaForCausalLM | T5ForConditionalGeneration:
    """A Llama or a T5 (1.1, with its embeddings tied) with random weights, a function of the seed."""
    torch.manual_seed(seed)
    if shape.family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=shape.hidden,
                d_kv=shape.hidden // shape.heads,
                d_ff=shape.intermediate or -(-shape.hidden * 8 // 3 // 32) * 32,
                num_layers=shape.layers,
                num_heads=shape.heads,
                n_positions=shape.context,  # type: ignore[call-arg]
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
            )
        )
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


def blocks(tokenizer: Any, record: Record, context: int) -> list[Tree]:
    """A text → one sequence, or several of at most `context` tokens where it is longer; the last ends with the end token."""
    ids = [*tokenizer(record.row["text"])["input_ids"], tokenizer.eos_token_id]
    return [chain(part, [1.0] * len(part), record.where) for part in _cut(ids, context)]


def parts(tokenizer: Any, record: Record, context: int) -> list[list[int]]:
    """A text → pieces of which spans can be taken out, at most `context` tokens each; without end tokens."""
    return _cut(tokenizer(record.row["text"], add_special_tokens=False)["input_ids"], context - 1)


def _cut(ids: list[int], length: int) -> list[list[int]]:
    return [part for k in range(0, len(ids), length) if len(part := ids[k : k + length]) > 1]
