"""Adapters: PEFT's own, in PEFT's format, tied to the base they were trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from temper import hub
from temper.errors import ModelError, nearest
from temper.models import load
from temper.recipe import Config
from temper.runfolder import write_json


class Adapter(Config):
    """What is trained instead of the whole model."""

    method: Literal["lora"] = Field(
        default="lora", description="LoRA (Hu et al. 2021): W + (alpha / r)·B·A with A and B trained."
    )
    r: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, description="Scale of the update; null: twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: str | list[str] = Field(
        default="all-linear", description="Layers to adapt: all-linear, a regular expression, or names."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / √r (Kalajdzievski 2023).")
    dora: bool = Field(default=False, description="Weight-decomposed LoRA (Liu et al. 2024).")


def attach(
    model: PreTrainedModel, adapter: Adapter, seed: int, *, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> PeftModel:
    """Put a fresh adapter on a model; it starts as nothing (B = 0). A classifier's head is trained whole beside it.

    Raises:
        ModelError: the targets match no layer; the names there are.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.r,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        # GPT-2 keeps its matrices transposed; PEFT finds that out by itself too, with a warning
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type=task,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        wanted = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        raise ModelError(
            f"adapter targets «{wanted}» match no layer ({str(error)[:120]})", do=nearest(wanted, names)
        ) from None


def save(
    model: PeftModel, folder: Path, base: hub.Source, *, stage: str | None, identity: str, ends: Iterable[int] = ()
) -> None:
    """PEFT's files, and `temper.json` with the base they belong to.

    `stage` names the stage of the same run whose model the base is, so that a run folder can be moved; `ends` are the
    end tokens trained on, which a merge writes into the model's generation settings.
    """
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(folder))
    named = {"name": base.name, "revision": base.revision, "adapters": list(base.adapters), "stage": stage}
    write_json(folder / "temper.json", {"base": named, "base_identity": identity, "ends": sorted(ends)})


def trained_ends(source: hub.Source) -> set[int]:
    """End tokens that the last adapter of a source was trained on."""
    note = Path(source.adapters[-1]) / "temper.json" if source.adapters else None
    return set(json.loads(note.read_text(encoding="utf-8")).get("ends", [])) if note and note.is_file() else set()


def put_on(model: PreTrainedModel, source: hub.Source) -> Any:
    """The adapters of a source on its base, in turn; all but the last are merged.

    Raises:
        ModelError: an adapter that was trained on another base.
    """
    wrapped: Any = model
    for k, folder in enumerate(source.adapters):
        if isinstance(wrapped, PeftModel):
            wrapped = wrapped.merge_and_unload()
        _check_base(folder, hub.Source(source.name, source.revision, source.adapters[:k]))
        try:
            wrapped = PeftModel.from_pretrained(wrapped, folder)
        except load.UNREADABLE as error:
            raise ModelError(
                f"the adapter {folder} does not fit {source.name}",
                where=str(error).splitlines()[0][:200],
                do="put it on the base it was trained on",
            ) from None
    return wrapped


def _check_base(folder: str, base: hub.Source) -> None:
    try:
        note = json.loads((Path(folder) / "temper.json").read_text(encoding="utf-8"))
    except OSError:
        return  # another tool's adapter: PEFT checks shapes, more cannot be known
    if note["base_identity"] != hub.identity(base):
        raise ModelError(
            f"the adapter {folder} was trained on another base than {base.name}",
            do=f"put it on {note['base']['name']}, or train it anew: on other weights its result would be wrong without an error",
        )


def merged(model: PeftModel) -> tuple[PreTrainedModel, float]:
    """The adapter folded into its base, and the largest relative change of a weight tensor.

    Raises:
        ModelError: the merge changed nothing, which would ship the base under another name.
    """
    # (module, name of its tensor): experts of a mixture are one parameter with a name of its own
    touched: list[Any] = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    places = [(m.get_base_layer(), getattr(m, "parameter_name", "weight")) for m in touched]
    before = [getattr(layer, name).detach().clone() for layer, name in places]
    out = model.merge_and_unload(safe_merge=True)
    after = (getattr(layer, name) for layer, name in places)
    change = max(((new - old).norm() / old.norm()).item() for new, old in zip(after, before, strict=True))
    if change == 0:
        raise ModelError(
            "merging changed nothing: the merged model would be its base",
            do="was the adapter trained? in half precision a small update rounds away",
        )
    return out, change


def open_model(
    source: hub.Source,
    *,
    dtype: torch.dtype = torch.float32,
    attention: load.Attention = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, list[str]]:
    """A model with its adapters on it, and notices."""
    base, notices = load.model(
        source, dtype=dtype, attention=attention, device=device, trust_remote_code=trust_remote_code
    )
    return put_on(base, source), notices
