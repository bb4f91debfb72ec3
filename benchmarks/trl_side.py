"""TRL's side of training: its trainers on the same rows, from the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from shapes import LORA, cool, warm

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()


def base() -> str:
    return os.environ["TEMPER_BENCH_BASE"]


def model(*, lora: bool, kind: Any = transformers.AutoModelForCausalLM, **more: Any) -> Any:
    found = kind.from_pretrained(base(), dtype=torch.float32, **more)
    return get_peft_model(found, LoraConfig(**LORA)) if lora else found


def arguments(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Of every configuration: what is named in the settings, on the processor, nothing saved or sent anywhere."""
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "num_train_epochs": 1, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 1e-6, "bf16": False, **settings,
    }  # fmt: skip


class Trained:
    """A trainer; one call of `epoch` trains on all rows once."""

    tokens, flops = 0, 0.0  # Temper's side tells of both

    def __init__(self, trainer: Any, *, warmed: bool = False) -> None:
        self.trainer, self.warmed = trainer, warmed
        self.trainer.remove_callback(transformers.PrinterCallback)

    def epoch(self) -> None:
        self.trainer.train()

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over all rows, each asked alone, weighted as one batch of all would be."""
        net, data = self.trainer.model, self.trainer.train_dataset
        net.train()
        if self.warmed:
            warm(net)
        total = weight = 0.0
        for k in range(len(data)):
            batch = self.trainer._prepare_inputs(self.trainer.data_collator([data[k]]))  # to where the model is
            mine = float(self.scored(batch))
            with self.trainer.compute_loss_context_manager():
                total += mine * float(self.trainer.compute_loss(net, dict(batch)))
            weight += mine
        if self.warmed:
            cool(net)
        return total / weight

    def scored(self, batch: dict[str, Any]) -> float:
        """What a row weighs in a batch: one, or its tokens."""
        return 1.0
