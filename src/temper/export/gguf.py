"""GGUF, the one file that llama.cpp, Ollama and LM Studio read: of Llama, Mistral, Qwen2 and Qwen3, tokenizer and chat template
included. What was written is read back by transformers' own reader and compared, before it counts as done.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from temper.data.written import begins, prefixes_of
from temper.errors import ModelError

Packing = Literal["f32", "f16", "q8_0"]
FILE = "model.gguf"
ALLOWED = {"f32": 1e-3, "f16": 0.1, "q8_0": 0.5}  # nats of a log-probability, read back
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # kinds of tokens
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    rf"{WORD}\p{{N}}{REST}": "qwen2",
    rf"{WORD}\p{{N}}{{1,3}}{REST}": "llama-bpe",
}  # how texts are cut, by readers' names


def write_gguf(hf: Any, tokenizer: Any, folder: Path, packing: Packing, rows: Sequence[Sequence[int]]) -> str:
    """Put model.gguf and a Modelfile for Ollama into a folder in place of its safetensors; a sentence on how it compares.

    Args:
        hf: the model, in float32.
        rows: token ids of texts on which what is read back is compared.

    Raises:
        ModelError: a kind of model, of positions or of tokenizer that cannot be written so that readers compute the same.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError("GGUF needs the package gguf", do="pip install 'temper-lm[gguf]'") from None
    config = hf.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"a {config.model_type} is not written as GGUF here: it was not checked that readers compute the same",
            do=f"kinds that are: {', '.join(ARCHITECTURES)}; or write safetensors",
        )
    words = _words(tokenizer, config.vocab_size)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, hf, packing, gguf)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(tokenizer))
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["kinds"])
    writer.add_token_merges(words["merges"])
    for name in ("bos", "eos", "pad"):
        if (at := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(at)
    writer.add_add_bos_token(begins(tokenizer))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in _tensors(hf):
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ModelError(f"GGUF has no name for {name}", do="write safetensors")
        wide = weight.ndim == 2 and weight.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType[packing.upper() if wide else "F32"]
        writer.add_tensor(there, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    difference = _read_back(hf, folder, rows)
    if difference > ALLOWED[packing]:
        raise ModelError(
            f"the GGUF file, read back, differs by up to {difference:.2g} nats a token",
            do="write f32 or f16" if packing == "q8_0" else "write safetensors",
        )
    for file in folder.iterdir():
        if file.name != FILE:
            file.unlink()
    (folder / "Modelfile").write_text(modelfile(tokenizer), encoding="utf-8")
    return f"as GGUF ({packing}), read back by transformers, by at most {difference:.1e} nats"


def _add_shape(writer: Any, hf: Any, packing: Packing, gguf: Any) -> None:
    config = hf.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"positions of the kind {rope['rope_type']} are not written as GGUF here", do="write safetensors"
        )
    if getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", config.model_type == "mistral"
    ):
        raise ModelError("GGUF readers ignore the sliding window of this model", do="write safetensors")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(str(config._name_or_path or "model")).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[packing]])


def _tensors(hf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Weights by their names in transformers, float32. A tied head is left out: readers take the embeddings then."""
    config, tied = hf.config, hf.config.tie_word_embeddings
    for name, weight in hf.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = weight.detach().float().cpu().numpy()
        if ARCHITECTURES[config.model_type] == "LLAMA" and (".q_proj." in name or ".k_proj." in name):
            array = _interleaved(
                array, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        yield name, np.ascontiguousarray(array)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Of each head, what turns together side by side: transformers turns place i with i + d/2, llama.cpp's Llama 2i with 2i + 1.

    >>> _interleaved(np.arange(8.0).reshape(8, 1), 2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _words(tokenizer: Any, rows: int) -> dict[str, list[Any]]:
    """The tokenizer's pieces by their ids, what kind each is, and its merges.

    Raises:
        ModelError: it is no byte-level BPE.
    """
    model = _description(tokenizer)["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ModelError("only byte-level BPE tokenizers are written as GGUF here", do="write safetensors")
    tokens, kinds = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for piece, at in model["vocab"].items():
        tokens[at], kinds[at] = piece, NORMAL
    for at, token in tokenizer.added_tokens_decoder.items():
        tokens[at], kinds[at] = token.content, CONTROL if token.special else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"tokens": tokens, "kinds": kinds, "merges": merges}


def _cut(tokenizer: Any) -> str:
    """How readers call this tokenizer's way to cut texts into words.

    Raises:
        ModelError: it is none that they know.
    """
    found = _description(tokenizer)["pre_tokenizer"] or {}
    parts = found.get("pretokenizers", [found])
    spaced = any(p.get("add_prefix_space") for p in parts)
    kinds = [] if spaced else [p.get("type") for p in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    own = parts[0]["pattern"].get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
    if own in CUTS and not parts[1].get("use_regex"):
        return CUTS[own]
    raise ModelError(
        "this tokenizer cuts texts into words in a way that GGUF readers do not know by name", do="write safetensors"
    )


def _description(tokenizer: Any) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise ModelError("a tokenizer in Python cannot be written as GGUF", do="write safetensors")
    return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[no-any-return]


def _read_back(hf: Any, folder: Path, rows: Sequence[Sequence[int]]) -> float:
    """The largest difference of a log-probability, in nats, of what transformers reads from the file."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            "the GGUF file cannot be read back by transformers, so nobody can say that it is right",
            where=str(error).splitlines()[0][:200],
            do="write safetensors",
        ) from None
    worst = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([list(row)])
            a, b = (model(ids).logits.log_softmax(-1) for model in (hf, again))
            worst = max(worst, (a - b).abs().max().item())
    return worst


def modelfile(tokenizer: Any) -> str:
    """What `ollama create NAME -f Modelfile` reads. Ollama knows the templates of widespread models by the one in the file;
    one of ours is told here."""
    lines = [f"FROM ./{FILE}", f'PARAMETER stop "{tokenizer.eos_token}"']
    prefixes = prefixes_of(tokenizer.chat_template or "")
    if prefixes:
        system = (
            f"{{{{ if .System }}}}{prefixes['system']}{{{{ .System }}}}{{{{ end }}}}" if "system" in prefixes else ""
        )
        lines.append(
            f'TEMPLATE """{system}{prefixes["user"]}{{{{ .Prompt }}}}{prefixes["assistant"]}{{{{ .Response }}}}"""'
        )
        lines.append(f'PARAMETER stop "{prefixes["user"]}"')
    elif not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
