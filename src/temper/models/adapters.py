"""Adapters: PEFT's own, in PEFT's format, tied to the base they were trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from temper import hub
from temper.errors import ModelError, nearest
from temper.models import adapted, load, quantized
from temper.models.methods import Adapter, Task, begin_as, of_layers, of_tokens
from temper.runfolder import write_json

__all__ = [
    "Adapter",
    "attach",
    "belongs",
    "merged",
    "open_model",
    "put_on",
    "save",
    "trained_ends",
]


def attach(
    model: PreTrainedModel, adapter: Adapter, seed: int, *, task: Task | None = None, tokenizer: Any = None
) -> PeftModel:
    """Put a fresh adapter on a model. What changes layers starts as nothing (LoRA: B = 0); virtual tokens begin at random or
    as a text. A classifier's head is trained whole beside it.

    Args:
        task: None: what the model is for, writing on or answering.
        tokenizer: for virtual tokens that begin as a text.

    Raises:
        ModelError: the targets match no layer, with the names there are; the model cannot take the method.
    """
    torch.manual_seed(seed)
    task = task or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")
    beneath = None
    if adapter.layers:
        _check_targets(adapter, model)
        config = of_layers(adapter, model, task)
        try:
            beneath = get_peft_model(model, config)
        except ValueError as error:
            given = adapter.targets or "all-linear"
            wanted = given if isinstance(given, str) else ", ".join(given)
            # PEFT's sentence repeats the targets where that is what is wrong, and tells of the fault where it is another
            why = "" if "not found in the base model" in str(error) else f" ({str(error).splitlines()[0][:120]})"
            raise ModelError(
                f"adapter targets «{wanted}» match no layer{why}", do=nearest(wanted, _linear(model))
            ) from None
    if adapter.virtual is None:
        assert isinstance(beneath, PeftModel)
        return beneath
    _check_virtual(model, adapter, task)
    try:
        with without_warnings():
            part: Any = get_peft_model(model, of_tokens(adapter, model, task))
    except ValueError as error:
        raise ModelError(
            f"{adapter.virtual} cannot be put on this model: {str(error).splitlines()[0][:200]}",
            do="activation_checkpointing: false, or method: prompt",
        ) from None
    if adapter.text is not None:
        begin_as(part, model, tokenizer, adapter.text)
    if beneath is None:
        return part  # type: ignore[no-any-return]
    for name, weight in beneath.named_parameters():  # PEFT has just frozen all that was there
        weight.requires_grad_(any(mark in name for mark in ("lora_A", "lora_B", "lora_E", "lora_magnitude", "ia3_")))
    return adapted.over(beneath, part)  # type: ignore[arg-type]


def described(hf: Any) -> str | None:
    """What is on a model, in words: methods, ranks, which layers, how many virtual tokens; None of a model without adapters."""
    said = []
    for part in adapted.parts(hf):
        config: Any = part.active_peft_config
        layers = [n for n, m in part.named_modules() if isinstance(m, BaseTunerLayer)]
        words = [adapted.kind(part).value.lower().replace("_", " ")]
        if (rank := getattr(config, "init_r", None)) is not None and hasattr(config, "target_r"):
            words.append(f"ranks {rank} to begin with and {config.target_r} on average at the end")
        elif (rank := getattr(config, "r", None)) is not None:
            words.append(f"rank {rank}")
        if (alpha := getattr(config, "lora_alpha", None)) is not None:
            words.append(f"alpha {alpha:g}")
        words += [
            name for on, name in (("use_rslora", "rank-stabilised"), ("use_dora", "DoRA")) if getattr(config, on, False)
        ]
        if (tokens := getattr(config, "num_virtual_tokens", None)) is not None:
            words.append(f"{tokens} virtual tokens")
        else:
            words.append(f"on {len(layers)} layers ({', '.join(sorted({n.rsplit('.', 1)[-1] for n in layers}))})")
        said.append(", ".join(words))
    return " + ".join(said) or None


def _linear(model: PreTrainedModel) -> list[str]:
    """Names that layers of a model have at their ends."""
    kinds = (torch.nn.Linear, Conv1D)
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, kinds)})


def _check_targets(adapter: Adapter, model: PreTrainedModel) -> None:
    """PEFT asks that one name of a list matches; of another, mistyped, nothing would be heard."""
    if not isinstance(adapter.targets, list):
        return
    there = [f".{name}" for name, _ in model.named_modules()]
    for wanted in adapter.targets:
        if not any(name.endswith(f".{wanted}") for name in there):
            raise ModelError(f"adapter targets: «{wanted}» matches no layer", do=nearest(wanted, _linear(model)))


def _check_virtual(model: PreTrainedModel, adapter: Adapter, task: Task) -> None:
    if task == "SEQ_CLS":
        raise ModelError(
            f"classifiers and reward models take adapters that change layers, and {adapter.virtual} adds tokens",
            do="choose method lora, adalora or ia3",
        )
    # a T5's positions have no end; it says how far it was trained to look
    context = load.context(model) or getattr(model.config, "n_positions", None)
    if context is not None and adapter.tokens >= context:
        raise ModelError(
            f"{adapter.tokens} virtual tokens leave no room in a context of {context} tokens",
            do="set adapter.tokens smaller",
        )


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """PEFT warns that a model is modified for a second time, which is what is meant here, and that AdaLoRA's ranks, which it
    applies, belong to no layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys .*lora_E")
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config` attribute")
        yield


def save(
    model: PeftModel,
    folder: Path,
    base: hub.Source,
    *,
    stage: str | None,
    identity: str,
    ends: Iterable[int] = (),
    quantize: quantized.Held | None = None,
) -> None:
    """PEFT's files, and `temper.json` with the base they belong to; of a combination each in a folder of its own, by the
    method's name.

    `stage` names the stage of the same run whose model the base is, so that a run folder can be moved; `ends` are the
    end tokens trained on, which a merge writes into the model's generation settings; `quantize` is how the base was held.
    """
    named = {"name": base.name, "revision": base.revision, "adapters": list(base.adapters), "stage": stage}
    note: dict[str, Any] = {"base": named, "base_identity": identity, "ends": sorted(ends)}
    if quantize is not None:
        note["quantize"] = quantize
    parts = adapted.parts(model)
    names = [adapted.kind(part).value.lower() for part in parts]
    for part, name in zip(parts, names, strict=True):
        inside = folder if len(parts) == 1 else folder / name
        part.peft_config["default"].base_model_name_or_path = base.name
        with warnings.catch_warnings():  # of a layer that AdaLoRA has left no rank PEFT thinks that shards are missing
            warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
            part.save_pretrained(str(inside))
        write_json(inside / "temper.json", note if len(parts) == 1 else note | {"one_of": names})
    if len(parts) > 1:
        write_json(folder / "temper.json", note | {"parts": names})


def trained_ends(source: hub.Source) -> set[int]:
    """End tokens that the last adapter of a source was trained on."""
    return set(_note(source.adapters[-1]).get("ends", [])) if source.adapters else set()


def _note(folder: str) -> dict[str, Any]:
    """The note beside an adapter; an empty one where another tool made it."""
    try:
        found: dict[str, Any] = json.loads((Path(folder) / "temper.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def put_on(model: PreTrainedModel, source: hub.Source) -> Any:
    """The adapters of a source on its base, in turn; all but the last are merged.

    Raises:
        ModelError: an adapter that was trained on another base, or that is one of two.
    """
    wrapped: Any = model
    for k, folder in enumerate(source.adapters):
        if isinstance(wrapped, PeftModel):
            wrapped, _ = merged(wrapped)
        note = _check_base(folder, hub.Source(source.name, source.revision, source.adapters[:k]))
        try:
            with without_warnings():
                for part in note.get("parts", ["."]):
                    one = PeftModel.from_pretrained(adapted.inner(wrapped), str(Path(folder) / part))
                    wrapped = adapted.over(wrapped, one) if isinstance(wrapped, PeftModel) else one
        except load.UNREADABLE as error:
            raise ModelError(
                f"the adapter {folder} does not fit {source.name}",
                where=str(error).splitlines()[0][:200],
                do="put it on the base it was trained on",
            ) from None
    return wrapped


def belongs(source: hub.Source) -> dict[str, Any]:
    """The note beside the last adapter of a source, which is on its base.

    Raises:
        ModelError: there is no adapter in that folder; it was trained on another base, or is one of two.
    """
    folder = source.adapters[-1]
    note = _check_base(folder, dataclasses.replace(source, adapters=source.adapters[:-1]))
    if "parts" not in note and not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter", do="give a folder with adapter_config.json, or a stage's that trained one")  # fmt: skip
    return note


def _check_base(folder: str, base: hub.Source) -> dict[str, Any]:
    """The note beside an adapter, if it belongs to this base."""
    note = _note(folder)
    if not note:
        return note  # PEFT checks shapes, more cannot be known
    if note["base_identity"] != hub.identity(base):
        raise ModelError(
            f"the adapter {folder} was trained on another base than {base.name}",
            do=f"put it on {note['base']['name']}, or train it anew: on other weights its result would be wrong without an error",
        )
    if both := note.get("one_of"):
        raise ModelError(
            f"the adapter {folder} was trained together with another one ({' and '.join(both)}); alone its answers are wrong",
            do=f"name the folder that holds both: {Path(folder).parent}",
        )
    return note


def merged(model: PeftModel) -> tuple[PreTrainedModel, float]:
    """The adapter folded into its base, and the largest relative change of a weight tensor.

    Raises:
        ModelError: it has virtual tokens, which are no part of any weight; the merge changed nothing, which would ship the
            base under another name.
    """
    if any(adapted.kind(part) in adapted.WORDS | adapted.KEYS for part in adapted.parts(model)):
        raise ModelError(
            "virtual tokens cannot be folded into a model's weights", do="keep the adapter apart: merge: false"
        )
    # (module, name of its tensor): experts of a mixture are one parameter with a name of its own
    touched: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
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
    packed: bool | None = None,
) -> tuple[Any, list[str]]:
    """A model with its adapters on it, and notices. A base that was held in few bits when the adapter trained is rounded
    as it was then.

    Args:
        packed: such a base stays in few bits, or its weights are written out in full; None: as suits the device.
    """
    base, notices = open_base(
        source, dtype=dtype, attention=attention, device=device, trust_remote_code=trust_remote_code, packed=packed
    )
    return put_on(base, source), notices


def held(source: hub.Source) -> quantized.Held | None:
    """In how few bits the base was held when the adapters of a source trained."""
    return _note(source.adapters[0]).get("quantize") if source.adapters else None


def open_base(
    source: hub.Source,
    *,
    dtype: torch.dtype = torch.float32,
    attention: load.Attention = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    packed: bool | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The base of a source as its adapters know it, without them; arguments as of `open_model`."""
    few = held(source)
    base, notices = load.model(
        source, dtype=dtype, attention=attention, device=device, trust_remote_code=trust_remote_code, quantize=few
    )
    if packed is None:  # LLM.int8 rounds what goes into a layer too: written out it would be another function
        packed = few == "int8" or torch.device(device).type == "cuda"
    if few and not packed:
        base = quantized.written_out(base, dtype)
    return base, notices
