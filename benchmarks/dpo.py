"""DPO: prompts of 250 to 310 tokens, answers of 16 to 150, LoRA.

Tuned, both sides keep the reference's log-probabilities, computed before and not timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contest import Contest, Settings, Side, grid
from shapes import ADAPTER, operations, pairs, text

ROWS = 16


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    rows = pairs(asked.pop("rows", ROWS))
    return _temper(folder, rows, asked) if which == "temper" else _trl(folder, rows, asked)


def _temper(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import temper_side

    stage = {"stage": "preference", "adapter": ADAPTER}
    written = [{"prompt": text(p), "chosen": text(a[:-1]), "rejected": text(b[:-1])} for p, a, b in rows]
    loop = temper_side.loop_of(folder, written, {**stage, **settings})
    side = temper_side.Trained(loop, len(rows), warmed=True)
    assert side.tokens <= sum(len(p) + len(a) + len(b) for p, a, b in rows)
    seen = sum(len(p) ** 2 / 2 + sum(len(x) * (len(p) + len(x) / 2) for x in (a, b)) for p, a, b in rows)
    trained = operations(side.tokens, sum(len(a) + len(b) for _, a, b in rows), seen, full=False)
    asked = 1.0 if settings.get("reference_kept") else 1.5  # the reference's forward pass is a third of a step's four
    side.flops = trained * asked
    return side


def _trl(folder: Path, rows: list[Any], settings: Settings) -> Side:
    import datasets
    import trl_side
    from peft import LoraConfig
    from shapes import LORA, tokenizer
    from trl import DPOConfig, DPOTrainer

    # a space before an answer: prompt and answer are joined as they are
    columns: dict[str, Any] = {
        n: [(" " if k else "") + text(row[k]) for row in rows] for k, n in enumerate(("prompt", "chosen", "rejected"))
    }
    if settings.get("train_sampling_strategy") == "group_by_length":
        columns["length"] = [len(p) + max(len(a), len(b)) for p, a, b in rows]
        settings |= {"length_column_name": "length", "remove_unused_columns": False}
    config = DPOConfig(**trl_side.arguments(folder, settings))
    data = datasets.Dataset.from_dict(columns)
    trainer = DPOTrainer(  # an adapter that is there already would be copied, as its own reference
        model=trl_side.model(lora=False), args=config, processing_class=tokenizer(), train_dataset=data,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    found = [tuple(r[f"{n}_ids"] for n in ("prompt", "chosen", "rejected")) for r in trainer.train_dataset]
    assert found == [tuple(row) for row in rows], "the rows did not reach TRL as these ids"
    return trl_side.Trained(trainer, warmed=True)


def _contests() -> list[Contest]:
    out = []
    for precision in ("float32", "bf16"):
        name, theirs = f"dpo-{precision}", {"bf16": precision == "bf16"}
        ours: Settings = {"precision": precision}
        out.append(Contest(name, "TRL DPOTrainer as documented", made, asked=4, ours=ours, theirs=theirs))
        out.append(
            Contest(
                name, "TRL DPOTrainer tuned", made, asked=3, ours={**ours, "reference_kept": True}, theirs=theirs,
                grid=grid((1, 2, 4, 8), precompute_ref_log_probs=True), some={"rows": 8},
            )
        )  # fmt: skip
    return out


CONTESTS = _contests()
