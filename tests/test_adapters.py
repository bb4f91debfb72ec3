"""Adapters: they start as nothing, merge exactly, switch off exactly, and are PEFT's own on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from temper import hub
from temper.errors import ModelError
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.models.scores import Policy
from temper.trees import chain, join
from tiny_models import VOCABULARY, build

KINDS = {
    "lora": Adapter(r=4),
    "rslora": Adapter(r=4, rslora=True, alpha=3.0),
    "dora": Adapter(r=4, dora=True),
    "by name": Adapter(r=2, targets=["q_proj", "down_proj"]),
    "by pattern": Adapter(r=2, targets=r".*layers\.1\.self_attn\..*_proj"),
}
IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def train(model: Any, steps: int = 3, lr: float = 0.05) -> None:
    """A few steps of SGD on made-up text, through the policy."""
    row = join([chain(line, [1.0] * len(line)) for line in IDS.tolist()])
    wanted = [p for p in model.parameters() if p.requires_grad]
    policy = Policy(model).train()
    for _ in range(steps):
        loss = -policy(row).mean()
        for p, g in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
            p.data -= lr * g / g.norm().clamp(min=1e-3)


def folder_of(model: Any, folder: Path) -> hub.Source:
    model.save_pretrained(folder)
    return hub.Source(str(folder))


@pytest.fixture
def base(tmp_path: Path) -> hub.Source:
    return folder_of(build("llama"), tmp_path / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_nothing_and_trains_itself_alone(kind: str, base: hub.Source) -> None:
    plain, _ = load.model(base)
    frozen = {n: p.detach().clone() for n, p in plain.named_parameters()}
    before = logits(plain)
    model = adapters.attach(plain, KINDS[kind], seed=0)
    assert torch.allclose(logits(model), before, atol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in trained}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    wanted = {"by name": {"q_proj", "down_proj"}, "by pattern": {"q_proj", "k_proj", "v_proj", "o_proj"}}
    assert adapted == wanted.get(kind, every), "all-linear leaves the head out"
    train(model)
    assert (logits(model) - before).abs().max() > 0.1
    assert all(
        torch.equal(p, frozen[name])
        for name, p in ((n.replace("base_layer.", ""), p) for n, p in model.get_base_model().named_parameters())
        if name in frozen
    )
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_adapter_and_is_a_plain_model(kind: str, base: hub.Source, tmp_path: Path) -> None:
    model = adapters.attach(load.model(base)[0], KINDS[kind], seed=0)
    train(model)
    expected = logits(model)
    out, change = adapters.merged(model)
    assert 0 < change < 1
    assert torch.allclose(logits(out), expected, atol=1e-5)
    assert not isinstance(out, PeftModel)
    out.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(again), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_alone_loads_what_was_saved(kind: str, base: hub.Source, tmp_path: Path) -> None:
    model = adapters.attach(load.model(base)[0], KINDS[kind], seed=0)
    train(model)
    expected = logits(model)
    adapters.save(model, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), str(tmp_path / "adapter"))
    assert torch.equal(logits(theirs), expected)
    ours, _ = adapters.open_model(hub.Source(base.name, None, (str(tmp_path / "adapter"),)))
    assert torch.equal(logits(ours), expected)


def test_the_update_is_alpha_over_r_times_b_a(base: hub.Source) -> None:
    """By hand: W + (alpha/r)·B·A; over √r with rslora. Twice the rank where alpha is not given."""
    for adapter, scale in (
        (Adapter(r=4), 2.0),
        (Adapter(r=4, alpha=3.0), 0.75),
        (Adapter(r=4, alpha=3, rslora=True), 1.5),
    ):
        model = adapters.attach(load.model(base)[0], adapter, seed=0)
        train(model, steps=1)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        by_hand = layer.base_layer.weight.double() + scale * b.double() @ a.double()
        adapters.merged(model)
        assert torch.allclose(layer.base_layer.weight.double(), by_hand, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral", "qwen3_moe"])
def test_other_kinds_of_layers(family: str, tmp_path: Path) -> None:
    """GPT-2's matrices are transposed, a mixture's experts are one parameter; both are adapted, saved and merged."""
    base = folder_of(build(family), tmp_path / "base")
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    assert family in {"gpt2", "gemma3"} or any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    train(model)
    expected = logits(model)
    adapters.save(model, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), str(tmp_path / "adapter"))
    assert torch.allclose(logits(theirs), expected, atol=1e-6)
    assert torch.allclose(logits(adapters.merged(model)[0]), expected, atol=2e-5)


def test_a_merge_that_changes_nothing_is_refused(base: hub.Source) -> None:
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    with pytest.raises(ModelError, match="merging changed nothing"):
        adapters.merged(model)


def test_seeds_decide_the_start(base: hub.Source) -> None:
    def start(seed: int) -> torch.Tensor:
        model = adapters.attach(load.model(base)[0], Adapter(r=4), seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]).detach()

    assert torch.equal(start(3), start(3)) and not torch.equal(start(3), start(4))


def test_dropout_is_the_adapters_and_only_in_training(base: hub.Source) -> None:
    model = adapters.attach(load.model(base)[0], Adapter(r=4, dropout=0.5), seed=0)
    train(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_on_other_weights_is_refused(base: hub.Source, tmp_path: Path) -> None:
    """Shapes fit, nothing would raise, and every answer would be wrong."""
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    train(model)
    adapters.save(model, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    other = folder_of(build("llama", seed=5), tmp_path / "other")
    with pytest.raises(ModelError, match="trained on another base") as error:
        adapters.open_model(dataclasses.replace(other, adapters=(str(tmp_path / "adapter"),)))
    assert base.name in error.value.do
    adapters.open_model(dataclasses.replace(base, adapters=(str(tmp_path / "adapter"),)))


def test_an_adapter_of_another_shape_is_refused(base: hub.Source, tmp_path: Path) -> None:
    """Another tool's adapter carries no note of its base; PEFT's own check is told in a sentence."""
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = build("llama").config
    config.hidden_size, config.intermediate_size, config.head_dim = 16, 24, 4
    torch.manual_seed(0)
    small = folder_of(AutoModelForCausalLM.from_config(config), tmp_path / "small")
    with pytest.raises(ModelError, match="does not fit"):
        adapters.open_model(dataclasses.replace(small, adapters=(str(tmp_path / "adapter"),)))


@pytest.mark.parametrize("kept", [None, 0, 900])
def test_a_damaged_adapter_is_told(kept: int | None, base: hub.Source, tmp_path: Path) -> None:
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    adapters.save(model, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.unlink() if kept is None else file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="does not fit"):
        adapters.open_model(dataclasses.replace(base, adapters=(str(tmp_path / "adapter"),)))


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT")
def test_a_second_adapter_stands_on_the_first_merged(base: hub.Source, tmp_path: Path) -> None:
    """Training goes on from an adapter: its own base is the old one with the first adapter folded in."""
    first, second = tmp_path / "first", tmp_path / "second"
    model = adapters.attach(load.model(base)[0], Adapter(r=4), seed=0)
    train(model)
    adapters.save(model, first, base, stage=None, identity=hub.identity(base))
    on_first = hub.Source(base.name, None, (str(first),))
    model = adapters.attach(adapters.merged(adapters.open_model(on_first)[0])[0], Adapter(r=4), seed=1)
    train(model)
    expected = logits(model)
    adapters.save(model, second, on_first, stage=None, identity=hub.identity(on_first))
    again, _ = adapters.open_model(hub.Source(base.name, None, (str(first), str(second))))
    assert torch.allclose(logits(again), expected, atol=1e-5)
    with pytest.raises(ModelError, match="another base"):
        adapters.open_model(hub.Source(base.name, None, (str(second),)))


@pytest.mark.parametrize("targets", [["q_porj"], ["v_proj", "q_porj"], "q_porj", ".*nothing"])
def test_targets_that_match_nothing_name_what_there_is(targets: Any, base: hub.Source) -> None:
    with pytest.raises(ModelError, match=r"match(es)? no layer") as error:
        adapters.attach(load.model(base)[0], Adapter(targets=targets), seed=0)
    assert "q_proj" in error.value.do
