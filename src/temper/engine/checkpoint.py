"""Checkpoints: enough to go on bit for bit, nothing pickled, checksummed, whole or not there.

checkpoints/step-N/   trainable.safetensors  optimizer.safetensors  [follower.safetensors]  state.json  checksums.json
checkpoints/best-N/   trainable.safetensors  state.json  checksums.json
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from temper.runfolder import checksums, damage, read_json, sync_folder, write_json


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def write(
    folder: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    follower: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write beside, then rename; an older checkpoint of the same name is replaced.

    `follower`: tensors that move with the policy's and cannot be had from them.

    Between the deletion of the older one and the rename, the new one stands beside, whole: `recover` names it.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    try:
        save_file(
            {n: p.detach().contiguous().cpu() for n, p in trainable(module).items()}, beside / "trainable.safetensors"
        )
        if optimizer is not None:
            save_file(_tensors(optimizer), beside / "optimizer.safetensors")
        if follower:
            save_file({n: t.contiguous().cpu() for n, t in follower.items()}, beside / "follower.safetensors")
        write_json(beside / "state.json", state)
        write_json(beside / "checksums.json", checksums(beside))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # on a full disk, the room is needed
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(beside, folder)
    sync_folder(folder.parent)


def recover(root: Path, say: Callable[[str], Any]) -> None:
    """Clear up after a kill: a checkpoint left beside takes its name if it is whole and no whole one has it."""
    for beside in sorted(root.glob(".*.tmp")):
        folder = root / beside.name.removeprefix(".").removesuffix(".tmp")
        if problem(beside) is None and problem(folder) is not None:
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(beside, folder)
            sync_folder(root)
        else:
            say(f"left out: a half-written checkpoint ({folder.name})")
            shutil.rmtree(beside)


def read_weights(folder: Path, module: torch.nn.Module) -> None:
    """Put a checkpoint's trainable tensors into a module that has the same ones."""
    found = load_file(folder / "trainable.safetensors")
    with torch.no_grad():
        for name, parameter in trainable(module).items():
            parameter.copy_(found[name])


def read_follower(folder: Path, follower: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's further tensors into those that are given."""
    found = load_file(folder / "follower.safetensors") if follower else {}
    with torch.no_grad():
        for name, tensor in follower.items():
            tensor.copy_(found[name])


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the moments of a checkpoint into an optimiser of the same groups."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def latest(root: Path, warn: Any) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state. Damaged ones are told and removed."""
    found = sorted(root.glob("step-*"), key=lambda p: -int(p.name.split("-")[1])) if root.is_dir() else []
    for folder in found:
        wrong = problem(folder)
        if wrong is None:
            return folder, read_json(folder / "state.json")
        warn(f"checkpoint {folder.name} is damaged ({wrong}); going back to an earlier one")
        shutil.rmtree(folder)
    if found:
        warn("no checkpoint is whole: training begins again, at step 0")
    return None


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where all is well."""
    try:
        return damage(folder, read_json(folder / "checksums.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its checksums cannot be read: {error}"


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; the best is kept apart."""
    for folder in sorted(root.glob("step-*"), key=lambda p: -int(p.name.split("-")[1]))[keep:]:
        shutil.rmtree(folder)


def bests(root: Path) -> list[Path]:
    return sorted(root.glob("best-*")) if root.is_dir() else []


def forget_bests(root: Path, *, but: int) -> None:
    """Delete earlier bests once a new one is whole: at any moment there is one."""
    for folder in bests(root):
        if folder.name != f"best-{but}":
            shutil.rmtree(folder)


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": value.detach().contiguous().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
