"""What the tests of the stage `preference` share: a model and a tokenizer of words, and rows for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import temper
from temper.types import Record
from tiny_models import VOCABULARY, build

ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "<bos> {% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def words(*, chat: bool = False, of: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """w5 is token 5, token 1 begins a text and 2 ends it; the last three tokens are the roles of a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {name: i for i, name in enumerate(("<pad>", "<bos>", "<eos>"))}
    names |= {f"w{i}": i for i in range(3, of - 3)} | {role: of - 3 + k for k, role in enumerate(ROLES)}
    made = Tokenizer(models.WordLevel(names, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not chat:
        made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(*tokens: int) -> str:
    return " ".join(f"w{t}" for t in tokens)


def ids(of: str, tokenizer: Any) -> list[int]:
    return tokenizer.convert_tokens_to_ids(of.split())


def pairs(n: int = 48) -> list[dict[str, Any]]:
    """Chosen answers are of the words 60 to 75, rejected ones of 40 to 55: a policy can learn to tell them apart."""
    rng = np.random.default_rng(7)

    def some(low: int, high: int, least: int, most: int) -> str:
        return text(*rng.integers(low, high, rng.integers(least, most)).tolist())

    return [
        {"prompt": some(5, 35, 5, 12), "chosen": some(60, 75, 2, 7), "rejected": some(40, 55, 2, 7)} for _ in range(n)
    ]


def labelled(n: int = 48) -> list[dict[str, Any]]:
    """The same as single answers with a label, good and bad in turn."""
    return [
        {"prompt": p["prompt"], "completion": p["chosen" if k % 2 else "rejected"], "label": bool(k % 2)}
        for k, p in enumerate(pairs(n))
    ]


def answer_logps(model: Any, row: dict[str, Any], answer: str) -> np.ndarray:
    """Log-probability of every token of an answer and its end token after the prompt, by the model itself, alone."""
    prompt, said = (ids(row[k], words()) for k in ("prompt", answer))
    whole = torch.tensor([[1, *prompt, *said, 2]])
    with torch.no_grad():
        logps = model(whole).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), whole.shape[1] - 1)
    return logps[at, whole[0, at + 1]].numpy()


def records(rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(row, f"rows.jsonl:{k + 1}") for k, row in enumerate(rows)]


def model_at(folder: Path, family: str = "llama", *, seed: int = 0, tokenizer: Any = None, **changed: float) -> Path:
    """A tiny model with its tokenizer in a folder. `changed`: entries of its configuration, such as a dropout."""
    model = build(family, seed=seed)
    for name, value in changed.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    (tokenizer or words()).save_pretrained(folder)
    return folder


STAGE: dict[str, Any] = {
    "stage": "preference", "data": "rows", "adapter": {"r": 4}, "batch_size": 8, "lr": 1e-2, "epochs": 2,
    "precision": "float32", "micro_tokens": 256, "row_tokens": 64,
}  # fmt: skip


def recipe(folder: Path, model: Path, rows: list[dict[str, Any]], **fields: Any) -> Path:
    """A recipe of two stages in a file: rows, and the stage on them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {
        "stage": "data", "source": "rows.jsonl", "validation": 8, "test": 0, "near_leaks": False,
        "drop": {"duplicates": "off"},
    }  # fmt: skip
    whole = {
        "name": "p", "model": str(model), "threads": 1, "stages": {"rows": data, "dpo": {**STAGE, **fields}},
    }  # fmt: skip
    file = folder / "r.yaml"
    file.write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML
    return file


def run(folder: Path, model: Path, rows: list[dict[str, Any]], **fields: Any) -> Path:
    """The finished stage's folder."""
    file = recipe(folder, model, rows, **fields)
    return temper.run(file, out=folder / "run", quiet=True) / "dpo"
