"""Supervised fine-tuning: prompt and answer, log-normal lengths averaging 180 tokens, the answer trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contest import BATCH, Contest, Settings, Side
from shapes import ADAPTER, lognormal, operations, text

ROWS = 64


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    rows = lognormal(asked.pop("rows", ROWS))
    return _temper(folder, rows, asked) if which == "temper" else _trl(folder, rows, asked)


def _temper(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import temper_side

    lora = settings.pop("lora")
    stage = {"stage": "sft", **({"adapter": ADAPTER} if lora else {})}
    written = [{"prompt": text(p), "completion": text(a[:-1])} for p, a in rows]
    side = temper_side.Trained(temper_side.loop_of(folder, written, {**stage, **settings}), len(rows))
    lengths = [len(p) + len(a) for p, a in rows]
    assert side.tokens == sum(lengths)
    side.flops = operations(
        sum(lengths), sum(len(a) for _, a in rows), sum(n * (n + 1) / 2 for n in lengths), full=not lora
    )
    return side


def _trl(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import datasets
    import trl_side
    from shapes import tokenizer
    from trl import SFTConfig, SFTTrainer

    class Answers(trl_side.Trained):
        def scored(self, batch: dict[str, Any]) -> float:
            return float((batch["labels"][:, 1:] != -100).sum())

    net = trl_side.model(lora=settings.pop("lora"))
    columns = {
        "input_ids": [p + a for p, a in rows],
        "completion_mask": [[0] * len(p) + [1] * len(a) for p, a in rows],
    }
    grouped = settings.get("train_sampling_strategy") == "group_by_length"
    if grouped:
        columns["length"] = [len(p) + len(a) for p, a in rows]
        settings |= {"length_column_name": "length", "remove_unused_columns": False}
    config = SFTConfig(completion_only_loss=True, **trl_side.arguments(folder, settings))
    data = datasets.Dataset.from_dict(columns)
    return Answers(SFTTrainer(model=net, args=config, processing_class=tokenizer(), train_dataset=data))


def _contests() -> list[Contest]:
    out = []
    for kind in ("lora", "full"):
        for precision in ("float32", "bf16"):
            shared: Settings = {"lora": kind == "lora"}
            ours, theirs = {**shared, "precision": precision}, {**shared, "bf16": precision == "bf16"}
            name = f"sft-{kind}-{precision}"
            out.append(Contest(name, "TRL SFTTrainer as documented", made, asked=4, ours=ours, theirs=theirs))
            tuned = _grid()
            asked = 2.5 if precision == "bf16" else 1.6
            out.append(Contest(name, "TRL SFTTrainer tuned", made, asked=asked, ours=ours, theirs=theirs, grid=tuned, some={"rows": 32}))  # fmt: skip
    return out


def _grid() -> tuple[Settings, ...]:
    """Batch and grouping, with the loss in chunks or not."""
    return tuple(
        {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size,
            "gradient_checkpointing": False, "loss_type": loss,
            **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
        }
        for size, grouped in ((1, False), (2, True), (4, True), (8, True))
        for loss in ("nll", "chunked_nll")
    )  # fmt: skip


CONTESTS = _contests()
