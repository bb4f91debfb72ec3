"""What is said before training: what goes in, what a step is, what it will cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import psutil

from temper.engine import chains, optim
from temper.engine import device as devices
from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.engine.streaming import Streaming
from temper.job import Job
from temper.models import adapters, load
from temper.trees import Row, Tree


def summarise(job: Job, loop: Loop, lines: Sequence[str], trees: Sequence[Tree], shown: str) -> None:
    """Say what is about to happen to a set of examples: data, one example, what a step is, and what it will cost."""
    batches = loop.batches
    assert isinstance(batches, Batches | Streaming)
    sizes, of_these = chains.sizes(trees), chains.scored(trees)
    tokens = int(sizes.sum())
    if of_these == 0:
        raise load.ModelError(
            "no token of any example is trained", do="look at the data's columns and at the chat template"
        )
    first, t = batches.rows(0), loop.training
    if (longest := int(sizes.max())) > t.micro_tokens:
        job.warn(
            f"the longest example has {longest:,} tokens, and micro_tokens is {t.micro_tokens:,}: examples are never cut for "
            "that, so its micro-batch takes more memory than the others"
        )
    lane = loop.policy.lane(t.row_tokens)
    cut = f"in rows of {lane}" if lane == t.row_tokens else "of like length" if lane == 1 else "end to end"
    step = f"{sum(len(r.trees) for r in first)} examples in {len(first)} micro-batches of up to {t.micro_tokens} tokens {cut}"
    span = "an epoch" if isinstance(batches, Batches) else "in the first window"
    data = [*lines, f"tokens: {tokens:,} {span}, {of_these:,} of them trained on ({of_these / max(1, tokens):.0%})"]
    row = max(first, key=lambda r: r.tokens)
    took, memory = probe(loop, [row])
    seconds = took / row.tokens * batches.tokens(loop.steps) / (1 - loop.plan.share)
    if loop.plan.text:
        data.append(loop.plan.text)
    announce(job, loop, data, step, (seconds, memory), shown)


def announce(job: Job, loop: Loop, lines: Sequence[str], step: str, cost: tuple[float, float], shown: str) -> None:
    """The summary before training, on the terminal and kept for the report.

    Args:
        lines: what goes in.
        step: what one optimiser step consists of.
        cost: seconds and bytes that the run is predicted to take.
        shown: one example.
    """
    f, c = job.facts, job.counts
    if (adapter := adapters.described(loop.policy.hf)) is not None:
        f["adapter"] = adapter
    share = c["trainable_parameters"] / c["parameters"]
    epochs = loop.steps / loop.batches.per_epoch
    part = "" if epochs >= 1 else ": part of the data is not seen"
    text = [
        *lines,
        f"one optimiser step: {step}",
        f"steps: {loop.steps} ({epochs:.2g} epochs{part}), {loop.warmup} of them warm-up, lr {loop.training.lr:g} ({_named(loop.training.schedule)})",
        f"parameters: {c['trainable_parameters']:,} of {c['parameters']:,} trained ({share:.2%})",
        *([f"adapter: {f['adapter']}"] if "adapter" in f else []),
        f"really used: {f['device']}, {f'processes {many}, ' if (many := f.get('processes')) else ''}{f['threads']} threads, {f['precision']} over {f.get('base held in', f['weights'])} weights, attention {f['attention']}, activation checkpointing {'on' if f['activation_checkpointing'] else 'off'}",
        f"layout {f['layout']}: {f['proof']}",
        f"predicted: about {_duration(cost[0])} and {cost[1] / 1e9:.1f} GB",
        "one example, the trained part in ⟦ ⟧:",
        *(f"  {line}" for line in shown.splitlines()),
    ]
    job.summary = "\n".join(text)
    job.say(job.summary)
    for warning in loop.warnings():
        job.warn(warning)


def _named(schedule: str | dict[str, Any]) -> str:
    """A schedule with all its options, as it is used."""
    name, options = optim.named(schedule)
    return ", ".join([name, *(f"{key} {value:g}" for key, value in options.items())])


def probe(loop: Loop, rows: Sequence[Row]) -> tuple[float, float]:
    """Seconds of one forward and backward pass over some rows, and bytes that training takes; nothing is changed."""
    loop.gradients(rows)  # the first pass also pays for what is done once
    began = time.perf_counter()
    loop.gradients(rows)
    took = time.perf_counter() - began
    memory: float = devices.peak_memory(loop.device) or _resident()
    for p in loop.policy.parameters():
        p.grad = None
    trained = sum(p.numel() * p.element_size() for p in loop.policy.parameters() if p.requires_grad)
    return took, memory + 2 * trained


def _resident() -> float:
    return float(psutil.Process().memory_info().rss)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
