"""The model that a policy is held close to: what it was before training."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel

from temper.models.scores import Policy
from temper.trees import Row


class Reference:
    """Log-probabilities under the weights that a policy has now, however it is trained afterwards.

    With an adapter these are the weights without it; with full fine-tuning a frozen copy. Make it before the first
    step, and before a checkpoint is read.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.copy: Policy | None = None
        if not isinstance(policy.hf, PeftModel):
            self.copy = Policy(copy.deepcopy(policy.hf).requires_grad_(False), policy.layout)
            self.copy.temperature = policy.temperature

    @torch.no_grad()
    def __call__(self, row: Row) -> torch.Tensor:
        """Log-probability of every scored token, float32 [S]."""
        if self.copy is not None:
            self.copy.train(self.policy.training)
            return self.copy(row)  # type: ignore[no-any-return]
        with self.policy.hf.disable_adapter():
            return self.policy(row)  # type: ignore[no-any-return]
