"""Tensors that are spread over processes (FSDP2), and whole ones."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes; all of them take part."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def spread(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is spread."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
