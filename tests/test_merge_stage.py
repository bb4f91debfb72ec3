"""The stage merge on several models: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import temper.app
from staged_runs import copy_stages
from temper import hub
from temper import recipe as recipes
from temper.errors import ModelError, RecipeError
from temper.models import adapters
from temper.models.adapters import Adapter
from temper.pipeline import Choice
from temper.runfolder import read_json
from tiny_models import warmed


def tuned(tiny: Path, folder: Path, seed: int, scale: float = 0.01) -> Path:
    """The tiny model with some noise on its weights."""
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(scale * torch.randn_like(p))
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def adapted(tiny: Path, folder: Path, seed: int) -> Path:
    """An adapter on the tiny model whose B is not zero."""
    source = hub.Source(str(tiny))
    model = warmed(adapters.attach(adapters.open_model(source)[0], Adapter(r=4), seed=seed), 0.05)
    adapters.save(model, folder, source, stage=None, identity=hub.identity(source))
    return folder


def run(folder: Path, smoke_run: Path, **fields: Any) -> Path:
    copy_stages(smoke_run, folder, "corpus", "tiny")
    temper.app.run_recipe(
        "detox-summarization",
        profile="smoke",
        overrides={"threads": 1, "stages": {"both": {"stage": "merge", **fields}}},
        choice=Choice(only=["both"]),
        out=folder,
        quiet=True,
    )
    return folder / "both"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_task_arithmetic_of_two_models_towards_their_start(tiny_model: Path, smoke_run: Path, tmp_path: Path) -> None:
    a, b = (tuned(tiny_model, tmp_path / str(k), k) for k in range(2))
    stage = run(
        tmp_path / "run", smoke_run, models=[str(a), str(b)], rule="task_arithmetic", weights=[1.0, -0.5], liti=0.5
    )
    start, one, two, found = state(tiny_model), state(a), state(b), state(stage / "model")
    for name, s in start.items():
        assert torch.allclose(found[name], s + 0.5 * ((one[name] - s) - 0.5 * (two[name] - s)), atol=1e-6), name
    assert AutoTokenizer.from_pretrained(stage / "model").get_vocab()
    assert "mean cosine" in read_json(stage / "stage.json")["facts"]["merge"]
    assert not (stage / "whole").exists()


def test_adapters_are_merged_by_their_products(tiny_model: Path, smoke_run: Path, tmp_path: Path) -> None:
    """The merge of two adapters is that of the models they stand for; the average of factors would be another."""
    folders = [adapted(tiny_model, tmp_path / f"adapter{k}", k) for k in range(2)]
    whole = []
    for k, folder in enumerate(folders):
        hf, _ = adapters.merged(adapters.open_model(hub.Source(str(tiny_model), None, (str(folder),)))[0])
        hf.save_pretrained(tmp_path / f"whole{k}")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / f"whole{k}")
        whole.append(str(tmp_path / f"whole{k}"))
    by_adapter = run(tmp_path / "by-adapter", smoke_run, models=[str(f) for f in folders])
    by_weights = run(tmp_path / "by-weights", smoke_run, models=whole)
    a, b, start = state(by_adapter / "model"), state(by_weights / "model"), state(tiny_model)
    assert all(torch.allclose(a[n], b[n], atol=1e-7) for n in a)
    assert any((a[n] - start[n]).abs().max() > 1e-3 for n in a)


def test_models_with_different_tokenizers_are_refused(tiny_model: Path, smoke_run: Path, tmp_path: Path) -> None:
    a, b = (tuned(tiny_model, tmp_path / str(k), k) for k in range(2))
    tokenizer = AutoTokenizer.from_pretrained(b)
    tokenizer.add_tokens(["щось"])
    tokenizer.save_pretrained(b)
    with pytest.raises(ModelError, match="different tokenizers"):
        run(tmp_path / "run", smoke_run, models=[str(a), str(b)])


def test_models_of_equal_shapes_that_read_them_differently_are_refused(
    tiny_model: Path, smoke_run: Path, tmp_path: Path
) -> None:
    """Heads twice as wide and half as many: every tensor has the same shape and means something else."""
    a, b = (tuned(tiny_model, tmp_path / str(k), k) for k in range(2))
    config = read_json(b / "config.json")
    heads = config["num_attention_heads"]
    config |= {"num_attention_heads": heads // 2, "num_key_value_heads": heads // 2, "head_dim": 2 * config["head_dim"]}
    (b / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"num_attention_heads is {heads} and {heads // 2}"):
        run(tmp_path / "run", smoke_run, models=[str(a), str(b)])


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "either model"),
        ({"model": "sft", "models": ["sft", "teacher"]}, "either model"),
        ({"models": ["sft"]}, "needs two models"),
        ({"models": ["sft", "teacher"], "weights": [1.0]}, "for 2 models"),
        ({"models": ["sft", "teacher"], "weights": [1.0, -1.0]}, "no shares"),
        ({"models": ["sft", "teacher"], "rule": "slurp"}, "there is no merge rule"),
        ({"models": ["sft", "teacher"], "rule": {"ties": {"density": 0}}}, "does not fit"),
        ({"model": "sft", "rule": "lerp"}, "belongs to models"),
        ({"models": ["sft", "nowhere-at-al"], "start": "corpus"}, "gives no model"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        recipes.load(
            "detox-summarization", profile="smoke", overrides={"stages": {"both": {"stage": "merge", **fields}}}
        )


def test_the_start_is_read_though_it_is_not_named() -> None:
    loaded = recipes.load(
        "detox-summarization",
        profile="smoke",
        overrides={"stages": {"both": {"stage": "merge", "models": ["sft", "teacher"]}}},
    )
    assert recipes.dependencies(loaded, "both") == ["sft", "teacher", "tiny"]
