"""What `gpu.py` times: workloads of the harness beside TRL, tools in turns in one process; and the tree pass itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contest
import shapes
import torch
from contest import Settings, Side
from gpu_machine import Bench

THEIRS: Settings = {"bf16": True, "use_cpu": False}


def beside_trl(module: str, shape: str, ours: Settings, theirs: dict[str, Settings], asked: float) -> Callable[[Bench], None]:  # fmt: skip
    """A part: one workload of the harness, Temper against TRL as documented and tuned."""

    def part(b: Bench) -> None:
        name = f"{module}-{b.take(shape)}-bf16"
        made = importlib.import_module(module).made
        start = b.memory(reset=True)
        temper = made("temper", _folder(b, "temper"), dict(_small(b, module, ours)))
        facts = {
            **ours,
            "attention": temper.loop.job.facts["attention"],
            "sampler": temper.loop.job.facts.get("sampler"),
        }
        mine = _Turn(b, temper, temper.loop.policy, start, ours=True)
        for against, settings in theirs.items():
            asked_for = dict(_small(b, module, {**THEIRS, **settings}))
            halved, flash = asked_for.pop("frozen_half", False), asked_for.pop("flash", False)
            needed = ["trl", *(["flash_attn"] if flash else [])]
            if missing := [n for n in needed if not importlib.util.find_spec(n)]:
                b.facts["left_out"][f"{name} against {against}"] = f"{', '.join(missing)} not installed"
                alone = [mine.epoch() for _ in range(3)]
                b.facts.setdefault("alone", {})[name] = {
                    "seconds": alone, "tokens": temper.tokens, "memory_bytes": mine.memory, "loss": mine.loss,
                    "peak_share": temper.flops / min(alone) / b.peaks["bf16"], "settings": facts,
                }  # fmt: skip
                continue
            start = b.memory(reset=True)
            with _free():
                other: Any = made("other", _folder(b, "other"), asked_for)
                if halved:
                    _half(other.trainer.model)
                if flash:
                    other.trainer.model.set_attn_implementation("flash_attention_2")
            turn = _Turn(b, other, other.trainer.model, start, ours=False)
            taken = [(mine.epoch(), turn.epoch()) for _ in range(1 if b.dry else 3)]
            b.write(_result(b, name, against, asked, mine, turn, taken, {"temper": facts, "other": settings}))
            del other, turn

    return part


class _Turn:
    """A side in this process: its loss, its peak while it warms up, its epochs."""

    def __init__(self, b: Bench, side: Side, model: torch.nn.Module, start: int, *, ours: bool) -> None:
        self.b, self.side, self.ours = b, side, ours
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with self.its_way():
            self.loss = side.loss()
            b.memory(reset=True)
            side.epoch()
        self.memory = max(1, b.memory() - start - weights)

    def epoch(self) -> float:
        with self.its_way():
            return self.b.synchronised(self.side.epoch)

    def its_way(self) -> Any:
        return contextlib.nullcontext() if self.ours else _free()


@contextlib.contextmanager
def _free() -> Iterator[None]:
    """Without the deterministic algorithms that Temper switches on for itself."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _half(model: Any) -> None:
    """What is not trained in bf16, as Temper's frozen base is on a card."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()


def _small(b: Bench, module: str, settings: Settings) -> Settings:
    if not b.dry:
        return settings
    rl = module == "grpo"
    few: Settings = (
        {"prompt": 20, "completions": 4, "new": 8, "prompts": 2, "steps": 1} if rl else {"rows": contest.BATCH}
    )
    kept = {k: v for k, v in settings.items() if k not in ("row_tokens", "micro_tokens")}
    if "use_cpu" not in settings:
        return {**kept, **few}
    sizes = (
        {"per_device_train_batch_size": 8}
        if rl
        else {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    )
    return {**kept, **few, **sizes, "use_cpu": b.device.type != "cuda"}


def _folder(b: Bench, which: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=which, dir=b.folder))


def _result(
    b: Bench, name: str, against: str, asked: float | None, mine: _Turn, other: _Turn, taken: list[tuple[float, float]],
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    side = mine.side
    ratios = sorted(y / x for x, y in taken)
    x, y = (statistics.median(column) for column in zip(*taken, strict=True))
    return {
        "name": name, "against": against, "asked": asked, "rounds": len(taken), "settings": settings,
        "time_ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        "seconds": {"temper": x, "other": y},
        "memory_ratio": other.memory / mine.memory, "memory_bytes": {"temper": mine.memory, "other": other.memory},
        "useful_tokens_per_second": {"temper": side.tokens / x, "other": side.tokens / y},
        "peak_share": side.flops / x / b.peaks["bf16"],
        "losses": {"temper": mine.loss, "other": other.loss}, "loss_difference": abs(mine.loss - other.loss),
    }  # fmt: skip


def passes(b: Bench) -> None:
    """The tree pass, forward and backward, all weights trained: by blocks in a line beside dense masks in lanes."""
    from transformers import AutoModelForCausalLM

    from temper.engine import device as devices
    from temper.models.proof import prove
    from temper.models.scores import Policy
    from temper.trees import Row, group, stack

    shape, new = b.take("0.5b"), 64
    hf = AutoModelForCausalLM.from_pretrained(os.environ["TEMPER_BENCH_BASE"], dtype=torch.float32).to(b.device)
    policy = Policy(hf)
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(shapes.FIRST, shapes.VOCABULARY, (n,), generator=draw).tolist()

    def step(row: Row) -> float:
        loss = -policy(row).mean()
        loss.backward()
        hf.zero_grad(set_to_none=True)
        return float(loss.detach())

    def timed(row: Row, pieces: bool) -> dict[str, Any]:
        policy.segments = pieces
        first = step(row)
        start = b.memory(reset=True)
        taken = [b.synchronised(lambda: step(row)) for _ in range(1 if b.dry else 5)]
        return {"seconds": taken, "memory": max(1, b.memory() - start), "loss": first, "attention": policy.attention}

    for prompt, number in ((60, 8), (600, 2)) if b.dry else ((600, 8), (600, 16), (4000, 2), (12_000, 1)):
        row = stack([[group(ids(prompt), [ids(new) for _ in range(8)])] for _ in range(number)]).to(b.device)
        with devices.autocast(b.device, "bf16"):
            prove(policy, length=prompt + new)
            pieces = policy.segments
            found = timed(row, pieces), timed(row, False)
            policy.segments = pieces
        made = number * 8 * new
        flops = shapes.operations(row.tokens, made, number * prompt**2 / 2 + made * (prompt + new / 2), full=True)
        (x, y), both = (statistics.median(f["seconds"]) for f in found), ("temper", "other")
        ratios = sorted(q / p for p, q in zip(*(f["seconds"] for f in found), strict=True))
        b.write({
            "name": f"tree-pass-{shape}-{number}x{prompt}+8x{new}", "against": "SDPA with dense masks", "asked": None,
            "rounds": len(ratios), "settings": {w: {"attention": f["attention"]} for w, f in zip(both, found, strict=True)},
            "time_ratio": {"median": y / x, "low": ratios[0], "high": ratios[-1]}, "seconds": {"temper": x, "other": y},
            "memory_ratio": found[1]["memory"] / found[0]["memory"],
            "memory_bytes": {w: f["memory"] for w, f in zip(both, found, strict=True)},
            "useful_tokens_per_second": {"temper": row.tokens / x, "other": row.tokens / y},
            "peak_share": flops / x / b.peaks["bf16"], "losses": {w: f["loss"] for w, f in zip(both, found, strict=True)},
            "loss_difference": abs(found[0]["loss"] - found[1]["loss"]),
        })  # fmt: skip
