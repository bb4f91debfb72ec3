"""merge: fold an adapter into its base, or merge models that were trained from one start."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import field_validator, model_validator

from temper import hub, merging
from temper.engine import device as devices
from temper.errors import ModelError, RecipeError
from temper.job import Job
from temper.models import adapters, folders, load
from temper.models.scores import Policy
from temper.recipe import ModelRef, Stage, detail, stages
from temper.stages.seen import note_trained_on
from temper.stages.training import proven_merge, settle
from temper.trees import chain, join

NEED_TWO = ("lerp", "slerp", "ties")


@stages.register("merge")
class Merge(Stage):
    """The whole model that an adapter and its base stand for, or one made of several by a merge rule."""

    kind = "merge"
    gives = "model"

    model: ModelRef | None = detail(None, "A stage or folder that holds an adapter: it is folded into its base.")
    models: list[ModelRef] | None = detail(None, "Models to merge, trained from one start; adapters count as whole.")
    start: ModelRef | None = detail(None, "What they were trained from; null: base. Their task vectors are merged.")
    rule: str | dict[str, Any] = detail("slerp", "A name or {name: {option: value}}; see `temper list rules`.")
    weights: list[float] | None = detail(None, "One number a model: a share (lerp, slerp), else a factor.")
    liti: float = detail(1.0, "η of start + η·merge: 1 the merge itself, less goes back towards the start.", ge=0, le=1)

    @field_validator("rule")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        configured(value, "rule")
        return value

    @model_validator(mode="after")
    def _sound(self) -> Merge:
        if (self.model is None) == (self.models is None):
            raise RecipeError(
                "merge takes either model (an adapter to fold into its base) or models (to merge with one another)",
                where="model",
                do="give one of the two",
            )
        if self.models is None:
            own = type(self).model_fields
            idle = [n for n in ("start", "rule", "weights", "liti") if getattr(self, n) != own[n].default]
            if idle:
                raise RecipeError(f"{idle[0]} belongs to models, and model alone is given", where=idle[0])
            return self
        check_models(self.models, self.rule, self.weights)
        return self

    def refs(self) -> Iterator[tuple[str, str, str]]:
        yield from super().refs()
        if self.models is not None and self.start is None:
            yield "start", "model", "base"

    def run(self, job: Job) -> None:
        if self.model is not None:
            self._fold(job, self.model)
        else:
            self._merge(job, self.models or [])
        note_trained_on(job, [])
        if written := next((f for r in job.inputs.values() if (f := r.info["facts"].get("written_as"))), None):
            job.facts["written_as"] = written

    def _fold(self, job: Job, ref: str) -> None:
        device = devices.of(job.recipe)
        source = job.model(ref)
        hf, notices = adapters.open_model(source, device=device, trust_remote_code=job.recipe.trust_remote_code)
        if not isinstance(hf, PeftModel):
            raise ModelError(
                f"{ref} holds no adapter, so there is nothing to merge", do="name a stage that trains an adapter"
            )
        for notice in notices:
            job.warn(notice)
        tokenizer = load.tokenizer(source, trust_remote_code=job.recipe.trust_remote_code)
        policy = Policy(hf)
        settle(job, policy, "auto", 64, device, "float32")
        probe = tokenizer("0 1 2 3 4 5 6 7 8 9 — А Б В a b c", add_special_tokens=True)["input_ids"]
        out = proven_merge(job, policy, join([chain(probe, [1.0] * len(probe))]))
        job.counts["parameters"] = load.parameters(out)[0]
        load.save(out, tokenizer, job.dir / "model", ends=adapters.trained_ends(source))

    def _merge(self, job: Job, names: Sequence[str]) -> None:
        devices.setup("cpu", job.recipe.threads)
        start, sources = job.model(self.start or "base"), [job.model(name) for name in names]
        tokenizer = one_tokenizer([start, *sources], trust_remote_code=job.recipe.trust_remote_code)
        base, *models = wholes(job, [start, *sources], job.dir / "whole")
        function = functools.partial(applied, configured(self.rule, "rule"), self.weights)
        folders.merge(base, models, job.dir / "model", function, eta=self.liti)
        tokenizer.save_pretrained(job.dir / "model")
        cosine, norms = folders.angles(base, models)
        if not all(norms):
            job.warn(f"{names[norms.index(0)]} equals the start: nothing of it is in the merge")
        lengths = ", ".join(f"{n:.3g}" for n in norms)
        job.facts["merge"] = f"task vectors of norm {lengths}" + (
            f", mean cosine {cosine:.2f}" if len(norms) > 1 else ""
        )
        whole, notices = load.model(
            hub.Source(str(job.dir / "model")), trust_remote_code=job.recipe.trust_remote_code
        )  # what was written can be loaded
        for notice in notices:
            job.warn(notice)
        job.counts["parameters"] = load.parameters(whole)[0]
        shutil.rmtree(job.dir / "whole", ignore_errors=True)


def configured(value: str | dict[str, Any], field: str) -> merging.Rule:
    """A merge rule with the options of the recipe; RecipeError where there is no such rule or option."""
    if isinstance(value, dict) and len(value) != 1:
        raise RecipeError(
            f"{value!r} is not one merge rule", where=field, do="write a name, or {name: {option: value}}"
        )
    name, options = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    checked = merging.rules.check(name, options or {}, where=field) if name in merging.rules else {}
    return functools.partial(merging.rules.get(name, where=field), **checked)


def check_models(names: Sequence[str], rule: str | dict[str, Any], weights: Sequence[float] | None) -> None:
    """RecipeError where a rule needs more models, or the weights do not fit it."""
    name = rule if isinstance(rule, str) else next(iter(rule))
    if len(names) < 2 and name in NEED_TWO:
        raise RecipeError(
            f"{name} needs two models or more, and {len(names)} is named",
            where="models",
            do="name more; rule: task_arithmetic with weights: [0.5] takes one model half the way back to its start",
        )
    try:
        (merging.shares if name in ("lerp", "slerp") else merging.scaled)(weights, len(names))
    except ModelError as error:
        raise RecipeError(error.what, where="weights", do=error.do) from None


def one_tokenizer(sources: Sequence[hub.Source], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of models that are to be merged: that of the second, which was trained last.

    Raises:
        ModelError: their tokens differ, so that a row of an embedding is another word in each.
    """
    found = [load.tokenizer(s, trust_remote_code=trust_remote_code) for s in sources]
    for source, tokenizer in zip(sources[1:], found[1:], strict=True):
        if tokenizer.get_vocab() != found[0].get_vocab():
            raise ModelError(
                "models with different tokenizers cannot be merged: one row of the embedding is another token in each",
                where=f"{sources[0].name} and {source.name}",
                do="merge models that were trained from one start",
            )
    return found[1]


def wholes(job: Job, sources: Sequence[hub.Source], folder: Path) -> list[Path]:
    """Each model as a folder of safetensors: its own where that is one, else one written below `folder`.

    An adapter is folded into its base, for the average of factors is not the average of their products. One model is in
    memory at a time. Where the names of tensors differ (a hub model's may lack a prefix), all are written anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    out = [_direct(s) or written(job, s, folder / str(k)) for k, s in enumerate(sources)]
    names = [folders.Tensors(p).shapes.keys() for p in out]
    if any(n != names[0] for n in names):
        out = [
            p if p.is_relative_to(folder) else written(job, s, folder / str(k))
            for k, (p, s) in enumerate(zip(out, sources, strict=True))
        ]
    return out


def written(job: Job, source: hub.Source, folder: Path) -> Path:
    """A model written as a folder in float32, its adapters folded in."""
    trust = job.recipe.trust_remote_code
    hf, notices = adapters.open_model(source, dtype=torch.float32, trust_remote_code=trust)
    for notice in notices:
        job.warn(notice)
    if isinstance(hf, PeftModel):
        hf, _ = adapters.merged(hf)
    load.save(hf, load.tokenizer(source, trust_remote_code=trust), folder, ends=adapters.trained_ends(source))
    return folder


def _direct(source: hub.Source) -> Path | None:
    folder = Path(source.name)
    return folder if source.local and not source.adapters and any(folder.glob("*.safetensors")) else None


def applied(
    rule: merging.Rule, weights: Sequence[float] | None, deltas: Sequence[torch.Tensor], name: str
) -> torch.Tensor:
    """A rule as `folders.merge` calls it."""
    return rule(deltas, weights, name)
