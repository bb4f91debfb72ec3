"""Bases in 4 and 8 bits: an adapter that trained on one finds it again, rounding included, and folds into it exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import temper.stages  # noqa: F401  fills the registry
from temper import hub, pipeline, recipe
from temper.errors import ModelError, RecipeError
from temper.models import adapters, load, quantized
from temper.models.adapters import Adapter
from temper.shapes import size_of_source
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


@pytest.mark.skipif(not quantized.MAPS.exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("held", HELD)
def test_loading_takes_no_more_than_what_is_held(held: quantized.Held, tmp_path: Path) -> None:
    """A file of 50 MB is read through, and none of it is kept: peak of the process, in one of its own."""
    config = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}  # fmt: skip
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    hf.save_pretrained(tmp_path / "base")
    size = sum(p.numel() * 4 for p in hf.parameters())
    program = (
        "import sys, gc\nfrom pathlib import Path\nfrom temper import hub\nfrom temper.models import load\n"
        "import transformers.models.llama.modeling_llama, transformers.integrations.bitsandbytes, bitsandbytes\n"
        "at = lambda key: int(next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith(key)).split()[1]) * 1024\n"
        "source = hub.Source(sys.argv[1])\n"
        "load.model(source, quantize=sys.argv[2]); gc.collect()\n"  # what is done once
        "before = at('VmRSS:'); Path('/proc/self/clear_refs').write_text('5')\n"
        "hf, _ = load.model(source, quantize=sys.argv[2])\n"
        "mapped = [x for x in Path('/proc/self/maps').read_text().splitlines() if x.endswith('.safetensors')]\n"
        "print(at('VmHWM:') - before, at('VmRSS:') - before, len(mapped))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "base"), held], capture_output=True, text=True, check=True)  # fmt: skip
    peak, left, mapped = map(int, done.stdout.split())
    assert size > 45e6 and mapped == 0, "the file is let go"
    assert peak < 0.8 * size and left < 0.45 * size, (peak, left, size)


def test_weights_that_were_trained_stay_what_they_are_while_another_copy_is_rounded(base: hub.Source) -> None:
    """Pages of files are given back, and those of a model that was written into are not among them."""
    mine = load.model(base)[0]
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(0.25)  # in place, in the mapping of the file
    before = [p.clone() for p in mine.parameters()]
    load.model(base, quantize="nf4")
    assert all(torch.equal(a, b) for a, b in zip(before, mine.parameters(), strict=True))


@pytest.mark.parametrize("held", [None, *HELD])
def test_a_plan_knows_what_a_base_takes(held: quantized.Held | None, tmp_path: Path) -> None:
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).save_pretrained(tmp_path / "base")
    source = hub.Source(str(tmp_path / "base"))
    hf = load.model(source, quantize=held)[0]
    taken = 0
    for p in hf.parameters():
        taken += p.numel() * p.element_size()
        if state := getattr(p, "quant_state", None):  # scales, their scales
            taken += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    assert size_of_source(source).bytes(held) == pytest.approx(taken, rel=0.01)
