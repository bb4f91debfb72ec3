"""Several processes by torch's own means: DDP, or FSDP2, over gloo on processors and NCCL on graphics cards.

A batch is dealt out by tokens. Its divisor is known before the first pass, so each process's loss is its part of the whole
one, and DDP and FSDP2, which average gradients, are given it times the number of processes. All make equally many passes:
FSDP2 gathers weights in each, and one that made fewer would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from temper.engine import device as devices
from temper.engine.spread import full
from temper.errors import RecipeError
from temper.models import adapted, quantized
from temper.models.scores import Policy
from temper.trees import Row, Tree, rows_of
from temper.world import Left, Parallel, World

LONG = datetime.timedelta(days=365)  # for what the main process does alone while the others wait
BEAT, SILENCE = 2.0, 20.0  # seconds between two signs of life; seconds without one after which a process counts as lost


class Processes(World):
    """The processes of one launch (torchrun, accelerate): their number and addresses stand in the environment.

    A process that ends is noticed by the launcher, which ends the others. One that is silent (stopped, its machine gone)
    is noticed by the others, each of which then ends; one that is behind by more than `patience` too.

    Args:
        patience: seconds that processes wait for one another where all have the same to do.
        cards: compute on graphics cards where there are any.

    Raises:
        RecipeError: more processes than cards.
    """

    def __init__(self, parallel: Parallel, patience: float = 50.0, *, cards: bool = True) -> None:
        cuda = cards and torch.cuda.is_available()
        if cuda:
            mine = int(os.environ.get("LOCAL_RANK", "0"))
            if mine >= torch.cuda.device_count():
                raise RecipeError(
                    f"there are {torch.cuda.device_count()} graphics cards here, and process {mine} would need another",
                    do="launch: {processes: …} at most as many, or device: cpu",
                )
            torch.cuda.set_device(mine)
        together = datetime.timedelta(seconds=patience)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=together)
        groups: list[Any] = [dist.new_group(backend="gloo", timeout=t) for t in (LONG, together)]
        self.waiting, self.meeting = groups
        self.rank, self.size, self.parallel = dist.get_rank(), dist.get_world_size(), parallel
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="temper-watch", daemon=True)
        self._watcher.start()

    def told(self, decide: Callable[[], Any]) -> Any:
        box = [decide() if self.main else None]
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.meeting)
        return out

    def summed(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(total, group=self.meeting)
        return total.tolist()

    def close(self) -> None:
        self._over.set()
        self._watcher.join()  # its connection must be closed before the process ends
        if dist.is_initialized():
            dist.destroy_process_group()

    def _watch(self) -> None:
        """Give signs of life, and look for those of the others."""
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]  # fmt: skip
        heard = {rank: (-1, time.monotonic()) for rank in range(self.size) if rank != self.rank}
        beats = 0
        while not self._over.wait(BEAT):
            beats += 1
            try:
                store.set(f"temper/beat/{self.rank}", str(beats))
                for rank, (last, when) in heard.items():
                    key = f"temper/beat/{rank}"
                    now = int(store.get(key)) if store.check([key]) else -1
                    if now != last:
                        heard[rank] = now, time.monotonic()
                    elif time.monotonic() - when > SILENCE and not self._over.is_set():
                        self._lost(rank)
            except (RuntimeError, ValueError):  # the launcher is gone, and with it whoever would end this process
                if not self._over.wait(SILENCE / 2):
                    os._exit(1)
                return

    def _lost(self, rank: int) -> None:
        """Nobody can be asked to end who waits for a process that is gone."""
        print(
            f"error: process {rank} has given no sign of life for {SILENCE:.0f} s\n"
            "do: look at its machine; the same command goes on from the last checkpoint", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)


def lost(error: Exception) -> str | None:
    """In words, an error that says that another process is gone or late; None of any other."""
    said = str(error)
    if "Timed out" in said or "timed out" in said:
        return "another process is so far behind that this one has given up waiting (launch.patience)"
    signs = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe", "store")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(sign in said for sign in signs)):
        return "another process of this run has ended"
    return None


def dealt(rows: Sequence[Row], size: int, row_tokens: int, micro_tokens: int) -> list[list[Row]]:
    """The trees of some rows dealt out, the largest first, each to whoever has the fewest tokens so far; packed anew."""
    trees = sorted((t for row in rows for t in row.trees), key=lambda t: -len(t))
    hands: list[list[Tree]] = [[] for _ in range(size)]
    tokens = [0] * size
    for tree in trees:
        least = tokens.index(min(tokens))
        hands[least].append(tree)
        tokens[least] += len(tree)
    return [rows_of(hand, row_tokens, micro_tokens) if hand else [] for hand in hands]


class Wrapped:
    """A policy that is trained by this world.

    `passes` are this process's micro-batches of a step: rows, and whether each counts. One that does not is computed so that
    all make equally many passes.
    """

    def __init__(self, policy: Policy, world: World, row_tokens: int, micro_tokens: int) -> None:
        self.policy, self.world = policy, world
        self.cut = (policy.lane(row_tokens) if hasattr(policy, "lane") else row_tokens, micro_tokens)
        self.module: torch.nn.Module = policy
        self.skeleton: Any = None
        self.kind = type(policy)
        if world.parallel == "fsdp":
            devices.keep_memory(False)  # memory is what spreading is for; the next stage sets both anew
            torch.set_autocast_cache_enabled(False)  # it would hold the whole model in half precision till a pass is over
            self.skeleton = copy.deepcopy(policy.hf, _without_memory(policy.hf))
            for layer in layers_of(policy):
                fully_shard(layer)
            fully_shard(policy)
            quantized.trim()  # what the whole weights took
        elif world.parallel == "ddp":
            self.module = DistributedDataParallel(policy)

    @property
    def spread(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return self.skeleton is not None

    def passes(self, rows: Sequence[Row]) -> list[tuple[Row, bool]]:
        if self.world.size == 1:
            return [(row, True) for row in rows]
        hands = dealt(rows, self.world.size, *self.cut)
        mine, most = hands[self.world.rank], max(map(len, hands))
        smallest = min((row for hand in hands for row in hand), key=lambda row: len(row.ids))
        return [*((row, True) for row in mine), *[(smallest, False)] * (most - len(mine))]

    @contextlib.contextmanager
    def gathering(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass: gradients are exchanged after the last one of a step (DDP)."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield

    def unwrap(self) -> None:
        """Give the policy all its weights again, on the main process; all of them take part.

        Raises:
            Left: this is another process, whose part is over.
        """
        if self.skeleton is not None:
            self._assemble()
        if not self.world.main:
            raise Left

    @contextlib.contextmanager
    def inference(self) -> Iterator[Any]:
        """The model with all its weights on every process, to decode with: through shards each token would gather them, and
        processes that write answers of other lengths would wait for one another for ever."""
        if self.skeleton is None:
            yield self.policy.hf
            return
        model = self._whole(copy.deepcopy(self.skeleton), everywhere=True)
        assert model is not None
        yield model.eval()

    def _assemble(self) -> None:
        model = self._whole(self.skeleton, everywhere=False)
        if model is None:
            return
        self.policy.__class__ = self.kind  # FSDP2 had made it a class of its own, with hooks that gather weights
        self.policy._forward_pre_hooks.clear()
        self.policy._forward_hooks.clear()
        self.policy.hf = model

    def _whole(self, model: Any, *, everywhere: bool) -> Any:
        """Fill an empty model with all the weights; on other processes than the main one only if it is wanted there."""
        here = everywhere or self.world.main
        for name, parameter in self.policy.hf.named_parameters():
            value = full(parameter)
            if here:
                _set(model, name, torch.nn.Parameter(value, requires_grad=parameter.requires_grad), buffer=False)
        if not here:
            return None
        for name, buffer in self.policy.hf.named_buffers():
            _set(model, name, buffer.detach().clone(), buffer=True)
        adapted.inner(model).tie_weights()
        return model


def _without_memory(model: torch.nn.Module) -> dict[int, Any]:
    """What `deepcopy` takes in the place of a model's tensors: others of their shapes, on the device meta."""
    parameters = {id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return parameters | {id(b): b.detach().to("meta") for b in model.buffers()}


def layers_of(policy: Policy) -> list[torch.nn.Module]:
    """The layers of a model, each gathered by itself while it is computed."""
    model, found = adapted.inner(policy.hf), list[torch.nn.Module]()
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    for name, some in lists:  # of lists within lists (experts) the outermost
        if not any(name.startswith(f"{other}.") for other, _ in lists):
            found += [layer for layer in some if any(True for _ in layer.parameters())]
    return found


def _set(model: Any, name: str, value: torch.Tensor, *, buffer: bool) -> None:
    place, _, last = name.rpartition(".")
    module = model.get_submodule(place)
    if buffer:
        module._buffers[last] = value
    else:
        setattr(module, last, value)
