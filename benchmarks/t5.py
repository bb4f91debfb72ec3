"""Encoder–decoders: fine-tuning a T5 beside transformers' Seq2SeqTrainer, and learning from 8 completions a prompt where the
encoder reads it once, beside reading it for each.

Shape: T5 1.1, 6 + 6 layers of width 512, vocabulary 32,000, random weights; LoRA on queries and values, or everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from contest import BATCH, Contest, Settings, Side, grid
from shapes import END, FIRST, VOCABULARY, text

ROWS = 64
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
ADAPTER = {"method": "lora", "r": 8, "alpha": 16, "targets": ["q", "v"]}
PROMPT, NEW, COMPLETIONS = 200, 32, 8


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    rows = ragged(asked.pop("rows", ROWS))
    base = saved(folder / "base")
    return _temper(folder, base, rows, asked) if which == "temper" else _trainer(folder, base, rows, asked)


def saved(folder: Path) -> str:
    import torch
    from shapes import tokenizer
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=END, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def ragged(n: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of 100 tokens and answers of 60 on average, log-normal both; both end with the end token."""
    draw, sigma = np.random.default_rng(0), 0.6

    def ids(mean: float, most: int) -> list[int]:
        length = int(np.clip(np.exp(draw.normal(np.log(mean) - sigma**2 / 2, sigma)), 4, most))
        return [*draw.integers(FIRST, VOCABULARY, length - 1).tolist(), END]

    return [(ids(100, 400), ids(60, 200)) for _ in range(n)]


def _temper(folder: Path, base: str, rows: list[Any], settings: Settings) -> Side:
    import temper_side

    lora = settings.pop("lora")
    stage = {"stage": "sft", **({"adapter": ADAPTER} if lora else {})}
    written = [{"prompt": text(p), "completion": text(a[:-1])} for p, a in rows]
    side = temper_side.Trained(temper_side.loop_of(folder, written, {**stage, **settings}, model=base), len(rows))
    assert side.tokens == sum(len(p) + len(a) for p, a in rows)
    return side


def _trainer(folder: Path, base: str, rows: list[Any], settings: Settings) -> Side:
    import datasets
    import trl_side
    from peft import LoraConfig, get_peft_model
    from shapes import tokenizer
    from transformers import (
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5ForConditionalGeneration,
    )

    class Answers(trl_side.Trained):
        def scored(self, batch: dict[str, Any]) -> float:
            return float((batch["labels"] != -100).sum())

    net = T5ForConditionalGeneration.from_pretrained(base)
    net = get_peft_model(net, LoraConfig(**LORA)) if settings.pop("lora") else net
    columns = {
        "input_ids": [p for p, _ in rows],
        "labels": [a for _, a in rows],
        "length": [len(p) + len(a) for p, a in rows],
    }
    settings.pop("gradient_checkpointing", None)
    if settings.get("train_sampling_strategy") == "group_by_length":
        settings |= {"length_column_name": "length"}
    config = Seq2SeqTrainingArguments(**trl_side.arguments(folder, settings))
    data = datasets.Dataset.from_dict(columns)
    collate = DataCollatorForSeq2Seq(tokenizer(), model=net)
    return Answers(Seq2SeqTrainer(model=net, args=config, train_dataset=data, data_collator=collate))


def practised(which: str, folder: Path, settings: Settings) -> Side:
    """Ours on both sides: a prompt with 8 completions, or as many prompts of its length with one each, which are decoded just
    so, and read eight times as often."""
    return _Group(saved(folder / "base"), together=which == "temper")


class _Group:
    """Rollouts and updates of a few prompts with 8 completions each, GRPO's own passes without the rest of a run."""

    def __init__(self, base: str, *, together: bool) -> None:
        import torch
        from shapes import tokenizer
        from transformers import T5ForConditionalGeneration

        from temper.models import adapters
        from temper.models.methods import Adapter
        from temper.models.proof import prove
        from temper.models.scores import Policy
        from temper.rollouts.decoding import Decoding
        from temper.rollouts.sampler import Sampler

        hf = adapters.attach(T5ForConditionalGeneration.from_pretrained(base), Adapter(**ADAPTER), seed=0)
        self.policy, self.together = Policy(hf), together
        assert prove(self.policy)["layout"] == "tree"
        draw = np.random.default_rng(0)
        self.prompts = [draw.integers(FIRST, VOCABULARY, PROMPT).tolist() for _ in range(4)]
        self.sampler = Sampler(hf, tokenizer(), end_ids=[])
        self.decoding = Decoding(max_new_tokens=NEW, temperature=1.0)
        self.tokens, self.flops = len(self.prompts) * (PROMPT + COMPLETIONS * NEW), 0.0
        self.read = 0
        hf.get_base_model().get_encoder().register_forward_hook(self._counted)
        self.torch = torch

    def _counted(self, module: Any, given: Any, out: Any) -> None:
        self.read += out.last_hidden_state.shape[0]

    def epoch(self) -> None:
        if self.together:
            found = self.sampler.sample(self.prompts, self.decoding, completions=COMPLETIONS)
            self._passes(self.prompts, [[c.ids for c in some] for some in found])
        else:  # turned, so that no two are equal: equal prompts are read once
            prompts = [p[k:] + p[:k] for p in self.prompts for k in range(COMPLETIONS)]
            self._passes(prompts, [[c.ids for c in some] for some in self.sampler.sample(prompts, self.decoding)])

    def _passes(self, prompts: list[list[int]], ids: list[list[list[int]]]) -> float:
        from temper.trees import group, rows_of

        total = 0.0
        for row in rows_of(
            [group(p, some) for p, some in zip(prompts, ids, strict=True)], self.policy.lane(2048), 2048
        ):
            loss = -self.policy(row).sum() / (len(self.prompts) * COMPLETIONS * NEW)
            loss.backward()
            total += float(loss.detach())
        self.policy.zero_grad()
        return total

    def loss(self) -> float:
        draw = np.random.default_rng(1)
        ids = draw.integers(FIRST, VOCABULARY, (len(self.prompts), COMPLETIONS, NEW)).tolist()
        if self.together:
            return self._passes(self.prompts, ids)
        return self._passes([p for p in self.prompts for _ in ids[0]], [[one] for some in ids for one in some])


def _contests() -> list[Contest]:
    out = []
    for kind in ("lora", "full"):
        for precision in ("float32", "bf16"):
            ours: Settings = {"lora": kind == "lora", "precision": precision}
            theirs: Settings = {"lora": kind == "lora", "bf16": precision == "bf16"}
            out.append(
                Contest(
                    f"t5-{kind}-{precision}", "transformers Seq2SeqTrainer tuned", made, asked=2 if kind == "lora" else None,
                    weights=False, ours=ours, theirs=theirs, grid=grid((2, 4, 8)), some={"rows": 32},
                )
            )  # fmt: skip
    out.append(Contest("t5-rollouts-float32", "a prompt for each completion", practised, tool="temper", weights=False))
    return out


CONTESTS = _contests()
assert BATCH == 8
