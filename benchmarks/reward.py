"""A reward model on the pairs of `dpo`: Bradley–Terry, all weights trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from contest import Contest, Settings, Side, grid
from shapes import operations, pairs, text

ROWS = 16


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    rows = pairs(asked.pop("rows", ROWS))
    return _temper(folder, rows, asked) if which == "temper" else _trl(folder, rows, asked)


def _headed(model: Any) -> Any:
    """The same fresh head on both sides."""
    with torch.no_grad():
        model.score.weight.copy_(
            0.02 * torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    return model


def _temper(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import temper_side

    written = [{"prompt": text(p), "chosen": text(a[:-1]), "rejected": text(b[:-1])} for p, a, b in rows]
    loop = temper_side.loop_of(folder, written, {"stage": "reward", **settings})
    _headed(loop.policy.inner)
    side = temper_side.Trained(loop, len(rows))
    assert side.tokens <= sum(len(p) + len(a) + len(b) for p, a, b in rows)
    seen = sum(len(p) ** 2 / 2 + sum(len(x) * (len(p) + len(x) / 2) for x in (a, b)) for p, a, b in rows)
    side.flops = operations(side.tokens, 0, seen, full=True)
    return side


def _trl(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import datasets
    import trl_side
    from shapes import tokenizer
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    columns: dict[str, Any] = {"chosen_ids": [p + a for p, a, _ in rows], "rejected_ids": [p + b for p, _, b in rows]}
    if settings.get("train_sampling_strategy") == "group_by_length":
        columns["length"] = [len(p) + max(len(a), len(b)) for p, a, b in rows]
        settings |= {"length_column_name": "length", "remove_unused_columns": False}
    net = _headed(trl_side.model(lora=False, kind=AutoModelForSequenceClassification, num_labels=1))
    config = RewardConfig(**trl_side.arguments(folder, settings))
    data = datasets.Dataset.from_dict(columns)
    return trl_side.Trained(RewardTrainer(model=net, args=config, processing_class=tokenizer(), train_dataset=data))


CONTESTS = [
    Contest("reward-float32", "TRL RewardTrainer as documented", made, asked=3, ours={"precision": "float32"}),
    Contest(
        "reward-float32", "TRL RewardTrainer tuned", made, asked=2, ours={"precision": "float32"}, grid=grid((1, 2, 4, 8)),
        some={"rows": 8},
    ),
]  # fmt: skip
