"""What every training stage does before and after the loop: a policy proven on the spot, and the summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from pydantic import model_validator

from temper import hub
from temper.data.card import read_rows
from temper.engine import device as devices
from temper.engine.settings import Training
from temper.errors import DataError
from temper.job import Job
from temper.models import adapted, adapters, load, quantized
from temper.models.adapters import Adapter
from temper.models.proof import check_causal, prove
from temper.models.scores import Policy
from temper.recipe import ModelRef, Stage, detail
from temper.trees import Row
from temper.types import Record


class TrainingStage(Stage, Training):
    """Fields of every stage that trains a model that exists."""

    gives = "model"
    trains_on = ("train", "validation")

    model: ModelRef = detail("base", "What is trained: a stage, base, a folder, or a hub id (id@revision).")
    adapter: Adapter | None = detail(None, "Train an adapter instead of the whole model.")
    quantize: quantized.Held | None = detail(
        None,
        "Hold the frozen base of an adapter in 4 bits (nf4, with its scales quantised too) or 8 (int8); needs the extra bnb.",
    )
    merge: bool = detail(False, "Fold the adapter into the base at the end; the adapter is saved too.")
    attention: load.Attention = detail("auto", "auto, sdpa, eager or flash_attention_2.")
    layout: str = detail(
        "auto",
        "auto: trees where they are proven equal on this model, else padded; tree insists, padded does without.",
        pattern="^(auto|tree|padded)$",
    )
    take: int | None = detail(
        None, "Only the first so many training rows: the best ones, where the data stage orders them by a mark.", ge=1
    )
    share: float = detail(
        1.0,
        "Share of the training rows that is used, drawn by the recipe's seed; a smaller one is part of a larger one. For learning curves.",
        gt=0,
        le=1,
    )
    seeds: int = detail(
        1, "Train this many times with different seeds; evaluations show the spread.", ge=1, affects_result=False
    )

    @model_validator(mode="after")
    def _merges(self) -> TrainingStage:
        if self.merge and self.adapter is not None and self.adapter.virtual:
            raise ValueError(
                f"merge folds an adapter into weights, and virtual tokens ({self.adapter.virtual}) are no part of any"
            )
        if self.quantize and self.adapter is None:
            raise ValueError(f"quantize: {self.quantize} is for the frozen base of an adapter, and there is no adapter")
        return self


def read_split(job: Job, ref: str, split: str, *, optional: bool = False) -> list[Record]:
    """Rows of one split of a data stage, of train the share that the stage asks for; none are an error unless `optional`."""
    path = job.rows(ref, split)
    if path is None and not optional:
        raise DataError(
            f"{ref} has no rows in its split «{split}»", do="set validation and test of that data stage smaller"
        )
    records = read_rows(path) if path is not None else []
    if split != "train":
        return records
    records = records[: getattr(job.stage, "take", None)]
    return shared(records, getattr(job.stage, "share", 1.0), job.recipe.seed)


def shared(records: list[Record], share: float, seed: int) -> list[Record]:
    """A share of rows, at least one, in their order. The rows of a smaller share are among those of a larger one."""
    if share == 1 or not records:
        return records
    drawn = np.random.default_rng([seed, len(records)]).permutation(len(records))
    return [records[k] for k in sorted(drawn[: max(1, round(share * len(records)))])]


def open_policy(
    job: Job, stage: TrainingStage, length: int, *, tokenizer: Any = None, grow: bool = False
) -> tuple[Policy, Any, hub.Source, str]:
    """The policy to train, its tokenizer, where its base came from, and the precision used.

    Args:
        length: tokens of the longest example, for the probe of the tree pass.
        tokenizer: by default the model's own.
        grow: it has more tokens than the model, which gets embeddings for them.
    """
    device = devices.of(job.recipe)
    precision = devices.precision(stage.precision, device)
    source = job.model(stage.model)
    tokenizer = tokenizer or load.tokenizer(source, trust_remote_code=job.recipe.trust_remote_code)
    # Trained weights are float32: in bf16 most of a small update rounds away. A frozen base may be half.
    frozen_half = stage.adapter is not None and precision != "float32" and device.type == "cuda"
    dtype = devices.DTYPES[precision] if frozen_half else torch.float32
    how: dict[str, Any] = {
        "attention": stage.attention,
        "device": device,
        "trust_remote_code": job.recipe.trust_remote_code,
    }
    if stage.quantize and source.adapters:
        raise load.ModelError(
            f"{stage.model} is a base with an adapter on it, which cannot be held in {stage.quantize} as one",
            do="merge: true in the stage that made it, or leave quantize out",
        )
    if stage.quantize:
        devices.keep_memory(False)  # memory is what a base in few bits is for; the next stage sets it anew
        hf, notices = load.model(source, dtype=devices.DTYPES[precision], quantize=stage.quantize, **how)
        job.facts["base held in"] = stage.quantize
    else:
        hf, notices = adapters.open_model(source, dtype=dtype, **how)
    for notice in notices:
        job.warn(notice)
    if n := adapted.virtual(hf):
        raise load.ModelError(
            f"{stage.model} has {n} virtual tokens, which are no part of its weights: training cannot go on from it",
            do="train on what it was trained on, or on an adapter without virtual tokens",
        )
    if isinstance(hf, PeftModel):  # training goes on from an unmerged adapter: fold it in, and train the next on top
        hf, _ = adapters.merged(hf)
        hf.requires_grad_(True)  # an adapter's base is frozen
    if grow:
        load.room_for(hf, tokenizer, job.seed)
    if stage.adapter is not None:
        hf = adapters.attach(hf, stage.adapter, job.seed, tokenizer=tokenizer)
        for parameter in hf.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if stage.activation_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(hf)
    settle(job, policy, stage.layout, length, device, precision)
    if stage.quantize:
        quantized.trim()  # what the proof left
    return policy, tokenizer, source, precision


def settle(job: Job, policy: Policy, layout: str, length: int, device: torch.device, precision: str) -> None:
    """Choose the layout by proof, and note what is really used."""
    if slow := devices.emulated(precision, device):
        job.warn(slow)
    with devices.autocast(device, precision):
        check_causal(policy)
    if layout == "padded":
        policy.layout, proof = "padded", {"reason": "asked for"}
    else:
        with devices.autocast(device, precision):
            proof = prove(policy, length=length)
        if layout == "tree" and policy.layout != "tree":
            raise load.ModelError(
                f"layout: tree was asked for, and {proof['reason']}",
                do="layout: auto takes the padded layout for such models",
            )
        if policy.layout == "padded":
            job.warn(
                f"trees are not used with this model ({proof['reason']}); the padded layout gives the same numbers, slower"
            )
    text = proof["reason"]
    if proof.get("difference") is not None:
        text += f" (log-probabilities differ by at most {proof['difference']:.1e}; by {proof['control']:.1e} if the mask were wrong)"
    note_used(job, policy, precision, text)


def scorable(job: Job, policy: Policy, lengths: Sequence[int]) -> np.ndarray:
    """Which validation rows of so many tokens the model can score, bool [N]: none is cut, and past the context positions
    that are computed as they come go on. Tells how many it cannot, and how many lie farther than it was trained to look."""
    context, reach = load.context(policy.inner), load.reach(policy.inner)
    sizes = np.asarray(lengths, np.int64)
    within = sizes <= reach if reach is not None else np.ones(len(sizes), bool)
    if lost := int((~within).sum()):
        job.warn(
            f"{lost} of {len(sizes)} validation rows are longer than the model's context ({context} tokens), where its "
            "positions end: they cannot be scored"
        )
    if context is not None and (far := int((sizes[within] > context).sum())):
        job.warn(
            f"{far} of {len(sizes)} validation rows are longer than the model's context ({context} tokens; its positions "
            "go on, so they are scored in full, farther than it was trained to look)"
        )
    return within


def note_used(job: Job, policy: Policy, precision: str, proof: str) -> None:
    """Note for the report what is really used, and how large the model is."""
    hf, device = policy.inner, policy.device
    every, trained = load.parameters(policy)
    job.counts.update(parameters=every, trainable_parameters=trained)
    job.facts.update(
        device=str(device)
        if device.type == "cpu"
        else f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type})",
        threads=torch.get_num_threads(),
        precision=precision,
        weights=str(next(policy.parameters()).dtype).removeprefix("torch."),
        attention=policy.attention,
        layout=policy.layout,
        proof=proof,
        activation_checkpointing=_recomputes(hf),
    )
    if job.world.size > 1:
        job.facts["processes"] = f"{job.world.size}, {job.world.parallel}"


def _recomputes(hf: Any) -> bool:
    """Whether activation checkpointing is on; transformers 5.2x renamed the property and warns at the old name."""
    name = "is_activation_checkpointing"
    return bool(getattr(hf, name if hasattr(type(hf), name) else "is_gradient_checkpointing", False))


def finish(
    job: Job, policy: Policy, tokenizer: Any, source: hub.Source, *, merge: bool, ends: set[int], probe: Row
) -> None:
    """Save what was trained in the formats of transformers and PEFT; a merge is proven against the adapter on `probe`."""
    stage_name = job.recipe.model if job.stage.model == "base" else job.stage.model  # type: ignore[attr-defined]
    hf = policy.hf
    job.peak_device_memory = devices.peak_memory(policy.device)
    if isinstance(hf, PeftModel):
        base_stage = stage_name if stage_name in job.inputs and not source.adapters else None
        identity = hub.identity(source)
        held = getattr(job.stage, "quantize", None)
        adapters.save(hf, job.dir / "adapter", source, stage=base_stage, identity=identity, ends=ends, quantize=held)
        tokenizer.save_pretrained(job.dir / "adapter")
        if not merge:
            return
        whole = _written_out(job, source, policy) if held else None
        hf = proven_merge(job, policy, probe, whole)
    load.save(hf, tokenizer, job.dir / "model", ends=ends)


def _written_out(job: Job, source: hub.Source, policy: Policy) -> Any:
    """The adapter just saved on its base with the rounded weights in full: into packed ones it would not fold exactly."""
    trained, trust = dataclasses.replace(source, adapters=(str(job.dir / "adapter"),)), job.recipe.trust_remote_code
    return adapters.open_model(trained, device=policy.device, trust_remote_code=trust, packed=False)[0]


def proven_merge(job: Job, policy: Policy, probe: Row, whole: Any = None) -> Any:
    """The merged model, its log-probabilities on real examples compared with the adapter's.

    Args:
        whole: the same adapter on another form of its base, to be merged instead.

    Raises:
        ModelError: they differ by more than rounding.
    """
    probe = probe.to(policy.device)
    policy.eval()
    with torch.no_grad():
        before = policy(probe)
        hf, change = adapters.merged(policy.hf if whole is None else whole)
        policy.hf = hf  # the adapter's layers are gone from the model: what wrapped it is no longer of use
        difference = (policy(probe) - before).abs().max().item()
    job.facts["merge"] = (
        f"weights changed by up to {change:.1e} of their norm; log-probabilities equal the adapter's to {difference:.1e}"
    )
    exact = before.dtype == next(hf.parameters()).dtype and getattr(job.stage, "quantize", None) != "int8"
    if difference > (1e-2 if exact else 0.5):
        raise load.ModelError(
            f"the merged model's log-probabilities differ from the adapter's by up to {difference:.2g} nats",
            do="merge: false keeps the adapter apart",
        )
    return hf
