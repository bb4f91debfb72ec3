"""Silences in whole runs: what one stage knows must reach the next, and the report's warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import temper
from temper import pipeline
from temper import recipe as recipes
from temper.engine import optim
from temper.errors import ModelError

# Ends an answer with a token that is not the end-of-sequence token.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def rows(path: Path, n: int, *, start: int = 0) -> None:
    made = [{"q": f"Скільки буде {k} і {k}?", "a": f"Буде {2 * k}."} for k in range(start, start + n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def data(source: str, **fields: Any) -> dict[str, Any]:
    return {
        "stage": "data",
        "source": source,
        "prompt": "{q}",
        "completion": "{a}",
        "validation": 0,
        "test": 0,
    } | fields


def write(file: Path, model: Path, stages: dict[str, Any]) -> Path:
    recipe = {"name": file.stem, "model": str(model), "threads": 1, "stages": stages}
    file.write_text(json.dumps(recipe, ensure_ascii=False), encoding="utf-8")
    return file


def info(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "stage.json").read_text(encoding="utf-8"))


def evaluation(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture
def talker(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose chat template ends answers with a token of its own."""
    folder = tmp_path / "talker"
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(tiny_model), tf.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_family(config: Any, tiny_model: Path, folder: Path) -> Path:
    """A model of another family, random, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_2_8_10_18_through_adapter_and_merge(talker: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 16)
    rows(tmp_path / "asked.jsonl", 8, start=12)  # rows 12 to 15 were trained on
    stages = {
        "train": data("train.jsonl"),
        "asked": data("asked.jsonl", test=7, format={"system": "Рахуй."}),
        "sft": {"stage": "sft", "data": "train", "adapter": {"r": 2}, "max_steps": 3, "lr": 1e-2},
        "whole": {"stage": "merge", "model": "sft"},
        "compare": {
            "stage": "evaluate", "models": ["base", "sft", "whole"], "data": "asked", "metrics": ["loss", "length"],
            "decoding": {"max_new_tokens": 3}, "resamples": 200,
        },
    }  # fmt: skip
    run = temper.run(write(tmp_path / "chain.yaml", talker, stages), out=tmp_path / "run", quiet=True)
    # 2: the merged model stops at the token it was trained to end with, in whatever tool it is used
    end = tf.AutoTokenizer.from_pretrained(talker).convert_tokens_to_ids("<|end|>")
    assert end in json.loads((run / "whole" / "model" / "generation_config.json").read_text())["eos_token_id"]
    # 10: it is not the base under another name, and equals the adapter
    before, after = (load_file(f / "model.safetensors") for f in (talker, run / "whole" / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    loss = {name: v["loss"]["value"] for name, v in evaluation(run, "compare")["models"].items()}
    assert loss["whole"] == pytest.approx(loss["sft"], abs=1e-5)
    assert abs(loss["whole"] - loss["base"]) > 1e-3
    told = info(run, "compare")["warnings"]
    for name in ("sft", "whole"):
        # 8: asked with a system message that training did not have
        assert any(w.startswith(f"{name} was trained on rows written as") and "'Рахуй.'" in w for w in told)
        # 18: the merge has seen what its adapter was trained on
        assert any(f"of 7 test rows stand in the training data of {name} " in w for w in told)
    assert not any(w.startswith("base ") for w in told)


def test_3_what_a_run_drops_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 16)
    long = {"q": "Скільки буде " + "один і " * 60 + "один?", "a": "Багато."}
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps(long) + "\n")
        file.write(json.dumps({**long, "q": long["q"] * 4}) + "\n")
    stages = {
        "train": data("train.jsonl", drop={"longer_than": 600}),
        "sft": {"stage": "sft", "data": "train", "max_steps": 1, "max_length": 64},
    }
    run = temper.run(write(tmp_path / "long.yaml", tiny_model, stages), out=tmp_path / "run", quiet=True)
    card = json.loads((run / "train" / "card.json").read_text())
    assert card["rows_in"] == 18 and card["rows_out"] == 17 and list(card["dropped"].values()) == [1]
    assert "rows: 17 in, 16 trained on; 1 longer than 64 tokens dropped" in info(run, "sft")["summary"]


def test_16_the_loss_of_an_evaluation_is_that_of_the_answers_alone(smoke_run: Path, tiny_model: Path) -> None:
    """transformers' own loss with the prompt's labels at −100, weighted by tokens."""
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(tiny_model), tf.AutoTokenizer.from_pretrained(tiny_model)
    total = tokens = 0.0
    for row in pyarrow.parquet.read_table(smoke_run / "toxic_news" / "data" / "test.parquet").to_pylist():
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [*tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"], tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        ids, labels = torch.tensor([whole]), torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * (len(whole) - len(prompt))
        tokens += len(whole) - len(prompt)
    found = evaluation(smoke_run, "compare")["models"]["base"]["loss"]["value"]
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_18_19_22_in_one_run(tiny_model: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 16)
    rows(tmp_path / "test.jsonl", 12, start=6)  # rows 6 to 15 stand in the training data too
    stages = {
        "train": data("train.jsonl", format={"separator": " "}),
        "asked": data("test.jsonl", format={"separator": " "}, test=6),
        "sft": {"stage": "sft", "data": "train", "batch_size": 4, "max_steps": 2, "warmup": 5},
        "compare": {
            "stage": "evaluate", "models": ["base", "sft"], "data": "asked", "metrics": ["loss"], "resamples": 200,
        },
    }  # fmt: skip
    file = write(tmp_path / "silence.yaml", tiny_model, stages)
    run = temper.run(file, out=tmp_path / "run", quiet=True)
    # 18: test rows in the training data of a model that is compared
    assert any("stand in the training data of sft" in w for w in info(run, "compare")["warnings"])
    # 22: two steps are less than an epoch of four, and less than the warm-up
    warnings, summary = " ".join(info(run, "sft")["warnings"]), info(run, "sft")["summary"]
    assert "steps: 2 (0.5 epochs: part of the data is not seen)" in summary, "asked for by max_steps: told, no warning"
    assert "never reaches its value" in warnings and "epoch" not in warnings
    # 19: other data under the same name, then another template: nothing old is read
    before = info(run, "sft")["key"]
    rows(tmp_path / "train.jsonl", 16, start=100)
    temper.run(file, out=run, quiet=True)
    other_data = info(run, "sft")["key"]
    assert other_data != before
    assert not any("stand in the training data" in w for w in info(run, "compare")["warnings"])
    file.write_text(file.read_text().replace("{q}", "Питання: {q}"))
    temper.run(file, out=run, quiet=True)
    assert info(run, "sft")["key"] not in (before, other_data)
    assert info(run, "asked")["config"]["prompt"] == "Питання: {q}"


def test_19_another_chat_template_is_another_model(talker: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 8)
    stages = {"train": data("train.jsonl"), "sft": {"stage": "sft", "data": "train"}}
    file = write(tmp_path / "keyed.yaml", talker, stages)

    def key() -> str:
        recipe = recipes.load(file)
        return pipeline.key_of(recipe, "sft", {"train": pipeline.key_of(recipe, "train", {})})

    before = key()
    assert key() == before
    written = [f for f in talker.iterdir() if "assistant: " in f.read_text(encoding="utf-8", errors="replace")]
    for place in written:
        place.write_text(place.read_text(encoding="utf-8").replace("assistant: ", "helper: "), encoding="utf-8")
    assert written and key() != before


def test_20_comparisons_are_paired_adjusted_together_and_say_what_n_could_show(smoke_run: Path) -> None:
    lines = [c for c in evaluation(smoke_run, "compare")["comparisons"] if c["p"] is not None]
    assert len(lines) > 3
    order = sorted(range(len(lines)), key=lambda k: lines[k]["p"])
    running = 0.0
    for rank, k in enumerate(order):  # Holm 1979
        running = max(running, min(1.0, (len(lines) - rank) * lines[k]["p"]))
        assert lines[k]["p_adjusted"] == pytest.approx(running)
    table = pyarrow.parquet.read_table(smoke_run / "compare" / "rows.parquet").to_pydict()
    (loss,) = [c for c in lines if (c["metric"], c["a"], c["b"]) == ("loss", "base", "sft")]
    pairs = np.array(table["sft|loss"]) - np.array(table["base|loss"])
    # all rows but a few move the same way: paired, that shows; the models' own intervals overlap almost wholly
    own = evaluation(smoke_run, "compare")["models"]
    assert loss["high"] - loss["low"] < 0.5 * (own["base"]["loss"]["high"] - own["base"]["loss"]["low"])
    assert abs(loss["difference"] - pairs.mean()) < 3 * pairs.std()
    assert loss["detectable_level"] == pytest.approx(0.05 / len(lines))
    could = 2 / 2 ** len(pairs) < 0.05 / len(lines)  # the clearest p of so few rows, and what Holm asks of it
    assert (loss["smallest_detectable"] is not None) == could


def test_21_an_adapter_whose_base_was_exchanged(smoke_run: Path, tmp_path: Path) -> None:
    """Same place, same shapes, other weights: everything would load."""
    for stage in ("tiny", "sft"):
        shutil.copytree(smoke_run / stage, tmp_path / "old" / stage)
    adapter, base = tmp_path / "old" / "sft" / "adapter", tmp_path / "old" / "tiny" / "model"
    file = write(tmp_path / "joined.yaml", adapter, {"whole": {"stage": "merge", "model": str(adapter)}})
    run = temper.run(file, out=tmp_path / "good", quiet=True)
    expected = load_file(smoke_run / "sft" / "model" / "model.safetensors")
    for name, tensor in load_file(run / "whole" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
    other = tf.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(base)
    with pytest.raises(ModelError, match="trained on another base"):
        temper.run(file, out=tmp_path / "bad", quiet=True)


def test_22_a_schedule_that_stands_still(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "train.jsonl", 8)
    stages = {"train": data("train.jsonl"), "sft": {"stage": "sft", "data": "train", "batch_size": 2, "warmup": 0}}
    file = write(tmp_path / "still.yaml", tiny_model, stages)
    moved = temper.run(file, out=tmp_path / "moved", quiet=True)
    assert info(moved, "sft")["warnings"] == []
    monkeypatch.setitem(optim.schedules._entries, "cosine", lambda step, steps, warmup: 1.0)
    still = temper.run(file, out=tmp_path / "still", quiet=True)
    assert any("«cosine» never moved the learning rate" in w for w in info(still, "sft")["warnings"])


def test_24_dropout_is_off_in_validation_and_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2 with its default of 0.1: what training says of the validation rows is what an evaluation finds, twice."""
    rows(tmp_path / "train.jsonl", 24)
    size = len(tf.AutoTokenizer.from_pretrained(tiny_model))
    config = tf.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    look = {"stage": "evaluate", "models": ["sft"], "data": "train.validation", "metrics": ["loss"], "resamples": 200}
    stages = {
        "train": data("train.jsonl", validation=8),
        "sft": {"stage": "sft", "data": "train", "max_steps": 2, "samples": 0, "lr": 1e-3, "keep_best": False},
        "look": look,
        "again": look,
    }
    file = write(tmp_path / "dropout.yaml", of_family(config, tiny_model, tmp_path / "gpt2"), stages)
    run = temper.run(file, out=tmp_path / "run", quiet=True)
    once, twice = (evaluation(run, name)["models"]["sft"]["loss"]["value"] for name in ("look", "again"))
    assert once == twice
    lines = [json.loads(text) for text in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_loss"] == pytest.approx(once, rel=1e-6)


def test_26_a_model_that_counts_positions_itself_is_padded_and_it_is_said(tiny_model: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 8)
    size = len(tf.AutoTokenizer.from_pretrained(tiny_model))
    config = tf.BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    stages = {"train": data("train.jsonl"), "sft": {"stage": "sft", "data": "train", "max_steps": 1}}
    file = write(tmp_path / "alibi.yaml", of_family(config, tiny_model, tmp_path / "bloom"), stages)
    run = temper.run(file, out=tmp_path / "run", quiet=True)
    assert info(run, "sft")["facts"]["layout"] == "padded"
    assert any("trees are not used with this model" in w for w in info(run, "sft")["warnings"])
    with pytest.raises(ModelError, match="layout: tree was asked for"):
        temper.run(file, {"stages": {"sft": {"layout": "tree"}}}, out=tmp_path / "insists", quiet=True)
