"""Bases in 4 and 8 bits: an adapter that trained on one finds it again, rounding included, and folds into it exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import temper.stages  # noqa: F401  fills the registry
from temper import hub, pipeline, recipe
from temper.errors import ModelError, RecipeError
from temper.models import adapters, load, quantized
from temper.models.adapters import Adapter
from test_adapters import IDS, logits, train
from tiny_models import build

functional = pytest.importorskip("bitsandbytes").functional
HELD: list[quantized.Held] = ["nf4", "int8"]


@pytest.fixture
def base(tmp_path: Path) -> hub.Source:
    build("llama").save_pretrained(tmp_path / "base")
    return hub.Source(str(tmp_path / "base"))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules() if type(m) is torch.nn.Linear}


@pytest.mark.parametrize("held", HELD)
def test_rounded_weights_are_those_of_transformers_and_near_the_whole_ones(
    held: quantized.Held, base: hub.Source
) -> None:
    whole = load.model(base)[0]
    packed = load.model(base, quantize=held)[0]
    assert load.parameters(packed)[0] == load.parameters(whole)[0]
    given = logits(packed)
    out = quantized.written_out(packed, torch.float32)
    assert (logits(out) - given).abs().max() < (1e-4 if held == "nf4" else 0.5)  # int8 rounds what goes in too
    found, wanted = weights(out), weights(whole)
    assert set(found) == set(wanted)
    for name in set(found) - {"lm_head"}:
        far = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert 1e-3 < far < (0.35 if held == "nf4" else 0.02), name
        if held == "nf4":
            packs = functional.quantize_4bit(wanted[name], compress_statistics=True, quant_type="nf4")
            assert torch.allclose(found[name], functional.dequantize_4bit(*packs), atol=1e-6)
    assert torch.equal(found["lm_head"], wanted["lm_head"])


def trained_on(base: hub.Source, held: quantized.Held, folder: Path) -> Any:
    hf = adapters.attach(load.model(base, quantize=held)[0], Adapter(r=4), seed=0)
    train(hf)
    adapters.save(hf, folder, base, stage=None, identity=hub.identity(base), quantize=held)
    return hf


@pytest.mark.parametrize("held", HELD)
def test_an_adapter_finds_the_base_that_it_trained_on(held: quantized.Held, base: hub.Source, tmp_path: Path) -> None:
    given = logits(trained_on(base, held, tmp_path / "adapter"))
    source = hub.Source(base.name, None, (str(tmp_path / "adapter"),))
    near = 1e-4
    for packed in (None, True, False):
        again, _ = adapters.open_model(source, packed=packed)
        assert (logits(again) - given).abs().max() < (0.5 if held == "int8" and packed is False else near)
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32} if held == "nf4" else {"load_in_8bit": True}  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(base.name, quantization_config=BitsAndBytesConfig(**settings))
    quantized.as_trained(theirs)  # else the first pass lays its weights out anew, and rounds them once more
    assert (logits(PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))) - given).abs().max() < near
    if held == "nf4":  # on the whole base it is another function
        plain = PeftModel.from_pretrained(load.model(base)[0], str(tmp_path / "adapter"))
        assert (logits(plain) - given).abs().max() > 100 * near


def test_it_folds_into_the_rounded_base_exactly(base: hub.Source, tmp_path: Path) -> None:
    given = logits(trained_on(base, "nf4", tmp_path / "adapter"))
    again, _ = adapters.open_model(hub.Source(base.name, None, (str(tmp_path / "adapter"),)))
    out, change = adapters.merged(again)
    assert change > 0 and (logits(out) - given).abs().max() < 1e-4
    out.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(plain) - given).abs().max() < 1e-4


def test_gradients_are_those_on_the_rounded_weights_in_full(base: hub.Source) -> None:
    found = []
    for full in (False, True):
        hf = load.model(base, quantize="nf4")[0]
        hf = adapters.attach(quantized.written_out(hf, torch.float32) if full else hf, Adapter(r=4), seed=0)
        hf(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in hf.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, wanted in found[1].items():
        assert torch.allclose(found[0][name], wanted, rtol=1e-3, atol=1e-5), name


def own_recipe(folder: Path, model: Path, **sft: Any) -> recipe.Recipe:
    rows = [{"question": f"Скільки буде {n} та {n}?", "answer": f"Разом {2 * n}."} for n in range(40)]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    data = {"stage": "data", "source": "qa.jsonl", "prompt": "{question}", "completion": "{answer}"}
    stages = {
        "qa": data,
        "tuned": {"stage": "sft", "data": "qa", "max_steps": 3, "adapter": {"r": 4}, "quantize": "nf4"} | sft,
        "compare": {"stage": "evaluate", "models": ["base", "tuned"], "data": "qa.test", "metrics": ["chrf"], "decoding": {"max_new_tokens": 4}},
    }  # fmt: skip
    (folder / "own.yaml").write_text(json.dumps({"name": "own", "model": str(model), "threads": 1, "stages": stages}))
    return recipe.load(folder / "own.yaml")


def test_a_recipe_trains_merges_and_evaluates(tiny_model: Path, tmp_path: Path) -> None:
    ran = pipeline.run(own_recipe(tmp_path, tiny_model, merge=True), tmp_path / "run", quiet=True)
    info = json.loads((ran.path / "tuned" / "stage.json").read_text())
    assert info["facts"]["base held in"] == "nf4" and "equal the adapter's to" in info["facts"]["merge"]
    whole = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert info["parameters"] == sum(p.numel() for p in whole.parameters()) + info["trainable_parameters"]
    note = json.loads((ran.path / "tuned" / "adapter" / "temper.json").read_text())
    assert note["quantize"] == "nf4"
    merged = AutoModelForCausalLM.from_pretrained(ran.path / "tuned" / "model")
    both = zip(merged.parameters(), whole.parameters(), strict=True)
    assert 0 < max(float((a - b).detach().norm() / b.detach().norm()) for a, b in both) < 0.15


def test_training_goes_on_only_from_a_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    made = own_recipe(tmp_path, tiny_model)
    more = {"second": copy.deepcopy(made.stages["tuned"]).model_copy(update={"model": "tuned"})}
    made.stages.update(more)
    del made.stages["compare"]
    with pytest.raises(ModelError, match="cannot be held in nf4") as error:
        pipeline.run(made, tmp_path / "run", quiet=True)
    assert "merge: true" in error.value.do


def test_bad_input(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="there is no adapter"):
        own_recipe(tmp_path, tiny_model, adapter=None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes") as error:
        quantized.configuration("nf4", torch.float32)
    assert "temper-lm[bnb]" in error.value.do
