"""Models and tokenizers from folders and from the hub, with what went wrong said plainly."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from temper.errors import ModelError
from temper.hub import Source
from temper.models import quantized

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

PADDED_POSITIONS = 8  # rows that a table of positions may have before the first position (OPT: 2)
# What damaged, foreign or missing weights raise in the libraries below.
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that read all they do from tokenizer.json
UNREADABLE = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError, pickle.UnpicklingError)


def tokenizer(source: Source, *, trust_remote_code: bool = False, here: bool = False) -> Any:
    """The tokenizer that belongs to a model (an adapter's own where it has one).

    Args:
        here: only what is on this machine already.

    Raises:
        ModelError: there is none, or it has neither a padding nor an end token to pad with.
    """
    places = [a for a in reversed(source.adapters) if (Path(a) / "tokenizer_config.json").is_file()]
    name, revision = (places[0], None) if places else (source.name, source.revision)
    try:
        how: dict[str, Any] = {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": here,
        }
        found = AutoTokenizer.from_pretrained(name, **how)
        # for some kinds of models (qwen2) transformers overrules a tokenizer that says it is all in tokenizer.json, and
        # cuts texts by the rules of that kind's first model
        said = get_tokenizer_config(name, **how).get("tokenizer_class")
        if said in GENERIC and type(found).__name__ not in GENERIC:
            found = PreTrainedTokenizerFast.from_pretrained(name, **how)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name}",
            where=_first_line(error),
            do="put tokenizer.json beside the weights",
        ) from None
    if found.pad_token_id is None and found.eos_token_id is not None:
        found.pad_token = found.eos_token  # only ever under a mask of zeros
    return found


def model(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    quantize: quantized.Held | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model or an encoder–decoder without its adapters, and notices worth telling.

    Raises:
        ModelError: missing or unreadable weights, remote code; bitsandbytes is not installed.
    """
    more: dict[str, Any] = {}
    if quantize is not None:
        more = {"quantization_config": quantized.configuration(quantize, dtype), "device_map": {"": str(device)}}
    config = configuration(source, trust_remote_code=trust_remote_code)
    if kind := next((a for a in config.architectures or [] if a.endswith("ForSequenceClassification")), None):
        raise ModelError(
            f"{source.name} is a classifier or a reward model ({kind}), not a language model",
            do='name the model that it began as; transformers\' pipeline("text-classification") opens it as it is',
        )
    attention = suited(config, attention, device)
    with quantized.lightly() if quantize is not None else contextlib.nullcontext():
        loaded, info, notices = weights(
            AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM,
            source,
            config,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            **more,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source.name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}, …); they would be random",
            do="is the download complete, and is it a language model?",
        )
    if info["unexpected_keys"]:
        notices.append(
            f"{len(info['unexpected_keys'])} weights of {source.name} belong to no part of the language model and are left out"
        )
    if quantize is not None:  # it is there already
        return quantized.as_trained(quantized.on_its_own(loaded)), notices
    loaded.to(device)  # type: ignore[arg-type]
    return loaded, notices


def suited(config: Any, attention: Attention, device: torch.device | str) -> Attention:
    """What `auto` stands for: of an encoder–decoder on a processor eager, for its lines are short and T5 adds a bias to every
    score, where torch's kernel is slower; of others transformers' own choice."""
    short = config.is_encoder_decoder and torch.device(device).type == "cpu"
    return "eager" if attention == "auto" and short else attention


def configuration(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _explained(source, error) from None


def weights(
    kind: Any,
    source: Source,
    config: Any,
    *,
    dtype: torch.dtype,
    attention: Attention,
    trust_remote_code: bool,
    **more: Any,
) -> tuple[Any, dict[str, Any], list[str]]:
    """(model, which weights were missing, unexpected or of another shape, notices worth telling).

    Args:
        kind: one of transformers' Auto classes.
        more: further arguments of its `from_pretrained`.

    Raises:
        ModelError: missing or unreadable files, remote code.
    """
    notices = []
    if source.local and not list(Path(source.name).glob("*.safetensors")):
        notices.append(f"{source.name} holds pickled weights only; they are read with torch.load(weights_only=True)")
    if attention != "auto":
        more["attn_implementation"] = attention
    try:
        with _quiet():
            loaded, info = kind.from_pretrained(
                source.name,
                config=config,
                revision=source.revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **more,
            )
    except UNREADABLE as error:
        raise _explained(source, error) from None
    return loaded, info, notices


def end_ids(hf: PreTrainedModel) -> list[int]:
    """Ids at which generation ends, as the model's generation settings have them."""
    eos = hf.generation_config.eos_token_id if hf.generation_config is not None else None
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def context(hf: PreTrainedModel) -> int | None:
    """The longest sequence the model takes, in tokens; None where nothing limits it."""
    config = hf.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def has_room(hf: PreTrainedModel, prompt: int, answer: int) -> bool:
    """Whether a prompt and an answer of so many tokens fit into a model's context: an encoder–decoder has one for each."""
    known = context(hf)
    return known is None or (max(prompt, answer) if hf.config.is_encoder_decoder else prompt + answer) <= known


def reach(hf: PreTrainedModel) -> int | None:
    """The longest sequence for which positions can be computed; None where they can for any length.

    Rotary positions and those of ALiBi are computed as they come, past the context that a model was trained with too. A
    table of positions (GPT-2, OPT) ends, be it learned or a buffer, and rotary angles that follow the longest sequence of
    a batch would give a row another score in other company: there the context is all there is.
    """
    known = context(hf)
    if known is None:
        return None
    scaling = getattr(hf.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    if any(part.get("rope_type") == "dynamic" for part in by_layer):
        return known
    tokens = hf.get_input_embeddings()
    tables = [m.num_embeddings for m in hf.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    buffers = [size for b in hf.buffers() if b.ndim > 1 for size in b.shape]
    ends = any(known <= size <= known + PADDED_POSITIONS for size in (*tables, *buffers))
    return known if ends else None


def no_dropout(hf: torch.nn.Module) -> None:
    """Every dropout of a model to zero, whatever mode it is in: ratios, references and samples allow none.

    Attention modules hold theirs as a number; LoRA's is a layer like others.
    """
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save(hf: PreTrainedModel, tok: Any, folder: Path, *, ends: set[int] | None = None) -> None:
    """transformers' format: safetensors, config, tokenizer, generation settings with the end tokens trained on."""
    if ends and hf.generation_config is not None:
        hf.generation_config.eos_token_id = sorted(ends | set(end_ids(hf)))
        hf.generation_config.pad_token_id = tok.pad_token_id
    with _quiet():
        hf.save_pretrained(folder)
    tok.save_pretrained(folder)


def room_for(hf: PreTrainedModel, tok: Any, seed: int) -> None:
    """Rows of the embeddings for all tokens of a tokenizer; new ones are drawn about the mean of the others (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models")."""
    embeddings: Any = hf.get_input_embeddings()
    if len(tok) > embeddings.num_embeddings:
        torch.manual_seed(seed)
        with _quiet():
            hf.resize_token_embeddings(len(tok))


def parameters(hf: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    every = sum(quantized.count(p) for p in hf.parameters())
    return every, sum(p.numel() for p in hf.parameters() if p.requires_grad)


@contextlib.contextmanager
def _quiet() -> Any:
    """transformers' own progress bars and load reports off: what matters is checked and said by us."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _explained(source: Source, error: Exception) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ModelError(
            f"{source.name} comes with Python code of its own, which Temper does not run by default",
            do="if you trust its author: --set trust_remote_code=true",
        )
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's own words here advise to run the code
        return ModelError(
            f"the pickled weights of {source.name} hold more than tensors; loading them could run code, so they are left",
            do="take the model as safetensors, or from an author who gives it so",
        )
    if isinstance(error, json.JSONDecodeError):
        return ModelError(f"the configuration of {source.name} is not valid JSON", do="download it again")
    return ModelError(
        f"{source.name} cannot be loaded",
        where=_first_line(error),
        do="is it complete, and of a kind that this transformers knows?",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
