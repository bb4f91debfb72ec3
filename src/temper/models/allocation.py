"""AdaLoRA's budget of ranks: which of them are taken away follows from how much each matters (Zhang et al. 2023).

PEFT scores and masks them. What is ours is the schedule, out of the number of steps, and that a run which was stopped goes
on as it would have: what PEFT remembers from step to step is part of each checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType

from temper.errors import TrainingError
from temper.models import adapted

SHORTEST = 10  # steps: in fewer there is no time for all three phases
BEFORE, AFTER = 0.1, 0.3  # shares of all steps: before ranks are taken away, and after the last one was


def of(hf: Any, steps: int) -> Allocation | None:
    """The allocation of a model's adapter, where it has one."""
    part = next((p for p in adapted.parts(hf) if adapted.kind(p) == PeftType.ADALORA), None)
    return None if part is None else Allocation(part, steps)


class Allocation:
    """Takes ranks away while a model trains.

    Args:
        part: PEFT's model with an AdaLoRA adapter.
        steps: optimiser steps of the whole training.

    Raises:
        TrainingError: too few steps.
    """

    def __init__(self, part: PeftModel, steps: int) -> None:
        if steps < SHORTEST:
            raise TrainingError(
                f"adalora takes ranks away between its first and its last steps, and there are {steps}",
                do=f"train at least {SHORTEST} steps, or choose method: lora",
            )
        self.tuner: Any = part.base_model
        self.config: Any = part.peft_config["default"]
        self.config.tinit, self.config.tfinal = max(1, round(BEFORE * steps)), max(1, round(AFTER * steps))
        self.config.total_step, self.config.deltaT = steps, max(1, steps // 100)
        self.steps_taken = torch.zeros(1, dtype=torch.int64)
        self.last = steps - self.config.tfinal
        self.allocator = self.tuner.rankallocator
        weights = dict(self.tuner.model.named_parameters())
        self.factors = {n: p for n, p in weights.items() if "lora_A.default" in n or "lora_B.default" in n}
        self.singular = {n: p for n, p in weights.items() if "lora_E.default" in n}
        self.masks = {n: torch.ones(len(p)) for n, p in self.singular.items()}
        self._remembered()

    def _remembered(self) -> dict[str, torch.Tensor]:
        """PEFT's running scores of all weights, made where they are not there yet."""
        out = {}
        for n, p in {**self.factors, **self.singular}.items():
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                table = getattr(self.allocator, kind)
                if n not in table:
                    table[n] = torch.zeros_like(p, requires_grad=False)
                out[f"{kind} {n}"] = table[n]
        return out

    def penalty(self) -> torch.Tensor:
        """How far the factors are from orthogonal, as PEFT adds it to the loss: the mean of ‖PPᵀ − I‖, weighted."""
        far = []
        for name, p in self.factors.items():
            square = p @ p.T if "lora_A" in name else p.T @ p
            far.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device, dtype=p.dtype)))
        return self.config.orth_reg_weight * torch.stack(far).mean()

    def settled(self, step: int) -> bool:
        """Whether after so many steps no more ranks are taken away."""
        return step >= self.last

    def follow(self) -> None:
        """After an optimiser step, while the gradients are still there."""
        self.steps_taken += 1
        self.tuner.update_and_allocate(int(self.steps_taken))
        for name, kept in (self.config.rank_pattern or {}).items():
            self.masks[name] = torch.tensor(kept, dtype=torch.float32)

    def go_on(self) -> None:
        """Take up what `tensors` were filled with: PEFT has the ranks that are left in its configuration."""
        if self.steps_taken:
            self.config.rank_pattern = {n: mask.bool().tolist() for n, mask in self.masks.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be remembered from step to step."""
        kept = {f"mask {n}": mask for n, mask in self.masks.items()}
        return {"steps": self.steps_taken, **kept, **self._remembered()}

    def ranks(self) -> list[int]:
        """Ranks that each layer has left."""
        return [int(mask.sum()) for mask in self.masks.values()]
