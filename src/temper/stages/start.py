"""Before learning from rewards begins: what must hold of prompts and reference, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from temper.data.chat import Encoded, show
from temper.engine import device as devices
from temper.engine.loop import Loop
from temper.errors import DataError, TrainingError
from temper.job import Job
from temper.models import adapted, load
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.stages.beforehand import announce, probe
from temper.stages.experience import Experience
from temper.stages.rollout import Prompt
from temper.trees import Row

# Mean distance, in nats, of a token's log-probability when it was sampled from the trainer's own. More is no rounding.
GAP = {"float32": 0.02, "bf16": 0.2, "fp16": 0.2}


def check_room(policy: Policy, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """DataError where a prompt and its answer do not fit into the model's context."""
    virtual = adapted.virtual(policy.hf)
    long = [p for p in prompts if not load.has_room(policy.inner, virtual + len(p.ids), new_tokens)]
    if long:
        raise DataError(
            f"{len(long)} prompts leave no room for {new_tokens} tokens in a context of {load.context(policy.inner)} "
            f"(the first has {len(long[0].ids)})",
            where=long[0].record.where,
            do="drop: {longer_than: …} with tokenizer: base in the data stage, or smaller decoding.max_new_tokens",
        )


def check_start(loop: Loop, rows: Sequence[Row], reference: Reference | None) -> None:
    """Before the first step the reference is the policy: TrainingError where it is not."""
    if reference is None:
        return
    with torch.no_grad(), devices.autocast(loop.policy.device, loop.precision):
        row = rows[0].to(loop.policy.device)
        difference = (loop.policy(row) - reference(row)).abs().max().item()
    if difference > GAP[loop.precision]:
        raise TrainingError(
            f"the reference is not the policy before the first step: log-probabilities differ by up to {difference:.2g} nats",
            do="was the adapter trained before? merge it first: merge: true in the stage that made it",
        )


def tell_of(job: Job, loop: Loop, experience: Experience, kl: Any, per_prompt: float, rows: Sequence[Row]) -> None:
    """The summary. A group of one prompt was sampled and is passed once to see what a step costs; nothing changes.

    Args:
        kl: the stage's settings of the KL term.
        per_prompt: seconds that a prompt's rollout takes.
        rows: that group.
    """
    update, memory = probe(loop, rows)
    plan, prompts, reference = experience.plan, experience.prompts, experience.reference
    seconds = loop.steps * plan.prompts * (per_prompt / plan.iterations + update)
    lengths = [len(p.ids) for p in prompts]
    anchor = "its own moving average" if reference and reference.rate else "the start"
    lines = [
        f"prompts: {len(prompts):,}, of {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}",
        f"reward: {' + '.join(f'{p.weight:g}·{p.name}' for p in experience.parts)}"
        + (f", KL to {anchor} {kl.beta:g} in the {kl.place}" if reference else ", no KL term"),
        f"written as: {job.facts['written_as']}",
        f"sampler: {job.facts['sampler']}",
    ]
    step = f"{plan.prompts} prompts × {plan.completions} completions of up to {plan.decoding.max_new_tokens} tokens"
    if experience.cycle > 1:
        step += f"; a rollout serves {plan.steps} × {plan.iterations} steps"
    tree = rows[0].trees[0]
    path, scored = tree.path(0), set(tree.tgt.tolist())
    one = Encoded(tree.ids[path].tolist(), [i in scored for i in path.tolist()], "")
    announce(job, loop, lines, step, (seconds, memory), show(experience.sampler.tokenizer, one))
