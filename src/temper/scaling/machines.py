"""A training stage on machines with graphics cards: memory and time of DDP and FSDP2 side by side, from shapes.

Legend: n processes, one a card.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from temper import hub, shapes
from temper.engine.processes import layers_of
from temper.errors import ModelError
from temper.models.scores import Policy
from temper.scaling import footprint
from temper.scaling.footprint import Footprint, Setting
from temper.shapes import Size
from temper.stages.rl import Rl
from temper.world import Parallel

REACHED = 0.4  # of a card's peak in products of matrices, over a whole step
LINKED = 0.7  # of what a link carries at most
ASIDE = 0.1  # of a card's memory: for its driver, compiled kernels, NCCL's buffers, and holes between tensors


@dataclasses.dataclass(frozen=True)
class Machines:
    """Cards, and what lies between them. Peaks as their makers give them: FLOP/s in bf16 without sparsity, bytes, and bytes
    per second of each card in one direction, to the others of its machine and to other machines."""

    machines: int
    gpus: int
    memory: float
    flops: float
    link: float
    network: float

    @property
    def size(self) -> int:
        return self.machines * self.gpus

    @property
    def room(self) -> float:
        """Bytes of a card that training may take."""
        return (1 - ASIDE) * self.memory

    @property
    def slowest(self) -> float:
        """Bytes per second and card in a ring through all of them."""
        return self.link if self.machines == 1 else min(self.link, self.network)

    @property
    def assumed(self) -> list[str]:
        """What the figures stand on, in sentences."""
        to_others = f" and {self.network / 1e9:g} to other machines" if self.machines > 1 else ""
        return [
            f"Assumed: a card computes {self.flops / 1e12:g} TFLOP/s at its peak, of which a step reaches {REACHED:.0%}, and sends "
            f"{self.link / 1e9:g} GB/s to others of its machine{to_others}, of which {LINKED:.0%} are reached; "
            f"{ASIDE:.0%} of its memory are set aside for driver, kernels, NCCL and holes.",
            "From shapes alone: nothing was run. A step takes the first time if all exchange is hidden behind computing, the second if none is.",
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train. `copy` and `cache`: while completions are sampled, whole weights beside the shards, and keys and
    values; seconds of a step, the exchange apart from the computing."""

    name: str
    held: Footprint
    copy: float
    cache: float
    computing: float
    exchanging: float

    @property
    def memory(self) -> float:
        """Bytes of a card when it holds most: while it trains, or while it samples."""
        return max(self.held.total, (self.held.weights + self.held.optimizer + self.copy + self.cache) * bool(self.cache))

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step, at least and at most: all that is exchanged is hidden behind computing, or nothing."""
        return max(self.computing, self.exchanging), self.computing + self.exchanging

    def fits(self, machines: Machines) -> bool:
        return self.memory <= machines.room


def size_of(name: str, folder: Path, *, trust_remote_code: bool = False) -> Size:
    """The size of a model from its configuration alone: a folder, its config.json, or a hub id.

    Raises:
        ModelError: there is none, or none that transformers knows.
    """
    for path in (folder / Path(name).expanduser(), Path(name).expanduser()):
        inner = path.parent if path.name == "config.json" else path
        if (inner / "config.json").is_file():
            source = hub.Source(str(inner.resolve()))
            break
        if inner.is_dir() and not (inner / "adapter_config.json").is_file():
            there = ", ".join(sorted(p.name for p in inner.iterdir())[:8])
            raise ModelError(f"{name} has no config.json, so that nothing is known of its shape", do=f"files there: {there or 'none'}")
    else:
        source = hub.locate(name, folder)
    if source.endpoint:
        raise ModelError(f"{name} stands behind an endpoint: its shape is not known", do="name a folder or a hub id")
    try:
        return shapes.size_of_source(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name} has no configuration that transformers knows: {str(error).splitlines()[0][:120]}", do="name a folder with a config.json, or a hub id") from None  # fmt: skip


def ways(stage: Any, size: Size, setting: Setting, machines: Machines) -> list[Way]:
    """DDP and FSDP2; of one card the one way there is.

    Raises:
        ModelError: nothing can be told of the model from shapes.
    """
    n, found = machines.size, []
    if n == 1:
        return [_way("one", None, stage, size, setting, machines)]
    kinds: list[tuple[str, Parallel]] = [("DDP", "ddp"), ("FSDP2", "fsdp")]
    if setting.adapter is not None and "adalora" in setting.adapter.method:  # it moves ranks between layers
        kinds = kinds[:1]
    for name, parallel in kinds:
        found.append(_way(name, parallel, stage, size, setting, machines))
    return found


def _way(name: str, parallel: Parallel | None, stage: Any, size: Size, setting: Setting, machines: Machines) -> Way:
    n = machines.size
    held = footprint.of(size.make, setting, parallel, n)
    flops = shapes.training_flops(
        size, scored=setting.scored, adapter=setting.adapter is not None, head_trained=setting.adapter is None,
        width=setting.width, recompute=setting.recompute,
    )  # fmt: skip
    whole = held.weights * (n if parallel == "fsdp" else 1)
    trained = 4.0 * (size.adapter(setting.adapter) if setting.adapter else size.parameters)
    moved = 0.0
    if parallel == "ddp":  # a sum over all and its way back, once a step
        moved = 2 * trained
    elif parallel == "fsdp":  # layers twice in each pass, the root once; gradients once, in each
        moved = setting.passes * (2 * whole - _root(size) * whole / (4 * size.parameters) + trained)
    tokens = setting.tokens * setting.passes
    copy = whole if parallel == "fsdp" and _samples(stage) else 0.0
    return Way(
        name, held, copy, _cache(stage, size, setting, n), tokens * flops / (REACHED * machines.flops),
        moved * (n - 1) / n / (LINKED * machines.slowest),
    )  # fmt: skip


def _root(size: Size) -> float:
    """Bytes in float32 of what is in no layer."""
    with torch.device("meta"):
        policy = Policy(size.make())
    return 4.0 * (size.parameters - sum(p.numel() for layer in layers_of(policy) for p in layer.parameters()))


def _samples(stage: Any) -> bool:
    """Whether the processes that train also sample."""
    return isinstance(stage, Rl) and stage.rollouts.engine == "native"


def _cache(stage: Any, size: Size, setting: Setting, n: int) -> float:
    """Bytes of keys and values while a stage samples: prompts, as many as fill the slots twice, and completions."""
    if not _samples(stage):
        return 0.0
    asked = max(1, stage.batch_size * stage.accumulation * stage.rollout_steps // n)
    slots = min(stage.slots, asked * stage.completions)
    places = min(asked, 2 * math.ceil(slots / stage.completions))
    tokens = slots * stage.decoding.max_new_tokens + places * setting.width
    return tokens * size.cached * (4 if setting.precision == "float32" else 2)
