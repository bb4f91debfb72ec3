"""Checkpoints: enough to go on bit for bit, nothing pickled, checksummed, whole or not there.

checkpoints/step-N/   trainable.safetensors  optimizer.safetensors  [follower.safetensors]  state.json  checksums.json
                      (each KIND-2.safetensors, … where it is larger than 256 MiB)
checkpoints/best-N/   trainable.safetensors  state.json  checksums.json
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from temper.engine.spread import full, spread
from temper.runfolder import checksums, damage, read_json, sync_folder, write_json

FILE = 1 << 28  # bytes of tensors in one file; larger ones have one to themselves


class Follower(Protocol):
    """What moves with the policy: it is told of every optimiser step, while the gradients are still there, and its tensors
    are part of each checkpoint."""

    def follow(self) -> None: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def write(
    folder: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    follower: dict[str, torch.Tensor] | None = None,
    *,
    here: bool = True,
) -> None:
    """Write beside, then rename; an older checkpoint of the same name is replaced.

    Args:
        follower: tensors that move with the policy's and cannot be had from them.
        here: False in a process that only takes part in gathering tensors that are spread.

    Between the deletion of the older one and the rename, the new one stands beside, whole: `recover` names it.
    """
    kinds: dict[str, Mapping[str, torch.Tensor]] = {"trainable": trainable(module)}
    if optimizer is not None:
        kinds["optimizer"] = _tensors(optimizer)
    if follower:
        kinds["follower"] = follower
    if not here:
        for tensors in kinds.values():
            for _ in _parts(tensors, here):
                pass
        return
    beside = folder.with_name(f".{folder.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    try:
        for kind, tensors in kinds.items():
            for n, part in enumerate(_parts(tensors, here)):
                save_file(part, beside / f"{kind}{f'-{n + 1}' if n else ''}.safetensors")
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
    parameters = trainable(module)
    with torch.no_grad():
        for name, tensor in _read(folder, "trainable"):
            parameters[name].copy_(spread(tensor, parameters[name]))


def read_follower(folder: Path, follower: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's further tensors into those that are given."""
    with torch.no_grad():
        for name, tensor in _read(folder, "follower"):
            follower[name].copy_(tensor)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the moments of a checkpoint into an optimiser of the same groups."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in _read(folder, "optimizer"):
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[key] = spread(tensor, like) if tensor.shape == like.shape else tensor
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


def number(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.rsplit("-", 1)[1])


def bests(root: Path) -> list[Path]:
    return sorted(root.glob("best-*")) if root.is_dir() else []


def forget_bests(root: Path, *, but: int) -> None:
    """Delete earlier bests once a new one is whole: at any moment there is one."""
    for folder in bests(root):
        if folder.name != f"best-{but}":
            shutil.rmtree(folder)


def _parts(tensors: Mapping[str, torch.Tensor], here: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Whole tensors, some at a time: those that are spread are gathered for one file, and elsewhere not kept at all."""
    part: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        whole = full(tensor)
        if not here:
            continue
        if part and held + whole.nbytes > FILE:
            yield part
            part, held = {}, 0
        part[name] = whole.contiguous().cpu()
        held += whole.nbytes
    if here:
        yield part


def _read(folder: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a kind, one after another."""
    for file in [folder / f"{kind}.safetensors", *sorted(folder.glob(f"{kind}-*.safetensors"))]:
        if file.is_file():
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  no mapping
                    yield name, opened.get_tensor(name)


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
