"""AdaLoRA: ranks really move, the budget is met, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import temper.app
from staged_runs import Workshop, copy_stages, lines_of
from temper.errors import TrainingError
from temper.hub import Source
from temper.models import adapted, adapters, allocation
from temper.models.adapters import Adapter
from temper.pipeline import Choice
from temper.runfolder import read_json
from test_resume import die_at_each, reference, started
from tiny_models import build

SFT: dict[str, Any] = {
    "stage": "sft", "model": "base", "data": "news", "adapter": {"method": "adalora", "r": 2, "first_r": 5}, "max_steps": 20,
    "batch_size": 8, "lr": 2e-2, "precision": "float32", "merge": False, "samples": 0, "evaluate_every": 4, "checkpoint_every": 3,
}  # fmt: skip


def run(folder: Path, smoke_run: Path, **fields: Any) -> Path:
    if not folder.exists():
        copy_stages(smoke_run, folder, "corpus", "tiny", "news")
    temper.app.run_recipe(
        "detox-summarization", profile="smoke", overrides={"threads": 1, "stages": {"sft": {**SFT, **fields}}},
        choice=Choice(only=["sft"]), out=folder, quiet=True,
    )  # fmt: skip
    return folder / "sft"


def test_ranks_move_and_the_budget_is_met(smoke_run: Path, tmp_path: Path) -> None:
    """The pattern that PEFT wrote: r a layer on average, not the same for all; the weights have those ranks."""
    stage = run(tmp_path / "run", smoke_run)
    config = json.loads((stage / "adapter" / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    facts = read_json(stage / "stage.json")["facts"]
    assert facts["ranks"] == f"2 on average, from {min(ranks)} to {max(ranks)}"
    saved = load_file(stage / "adapter" / "adapter_model.safetensors")
    assert sorted(len(t) for n, t in saved.items() if n.endswith("lora_E")) == sorted(ranks)
    hf, _ = adapters.open_model(Source(str(tmp_path / "run" / "tiny" / "model"), None, (str(stage / "adapter"),)))
    ids = torch.arange(5, 20)[None]
    with torch.no_grad(), adapted.off(hf):
        plain = hf(input_ids=ids).logits
    assert (hf(input_ids=ids).logits - plain).abs().max() > 0.01
    steps = [x for x in lines_of(stage / "metrics.jsonl") if "orthogonality" in x]
    assert steps[-1]["orthogonality"] != steps[0]["orthogonality"]
    assert sum(x["loss"] for x in steps[-6:]) < sum(x["loss"] for x in steps[:6])


def test_weights_that_are_kept_have_their_final_ranks(smoke_run: Path, tmp_path: Path) -> None:
    """The best validation counts only once no more ranks are taken away."""
    stage = run(tmp_path / "run", smoke_run, evaluate_every=2)
    marked = [x["step"] for x in lines_of(stage / "metrics.jsonl") if x.get("best")]
    assert marked and min(marked) >= 14


def test_too_few_steps_are_told() -> None:
    hf = adapters.attach(build("llama"), Adapter(method="adalora", r=2, first_r=4), seed=0)
    with pytest.raises(TrainingError, match="and there are 4"):
        allocation.of(hf, 4)


def test_a_run_without_allocation_would_be_seen(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were ranks never taken away, the first test here would fail: all layers keep all of theirs."""
    monkeypatch.setattr(allocation.Allocation, "follow", lambda self: None)
    stage = run(tmp_path / "run", smoke_run)
    assert read_json(stage / "stage.json")["facts"]["ranks"] == "5 on average, from 5 to 5"


def test_what_is_remembered_comes_back() -> None:
    """Scores, masks and the number of steps, put into a fresh allocation, lead to the same next step."""

    def trained(hf: Any, made: allocation.Allocation, steps: range) -> None:
        for k in steps:
            torch.manual_seed(k)
            for p in hf.parameters():
                if p.requires_grad:
                    p.grad = torch.randn_like(p)
                    p.data -= 0.01 * p.grad
            made.follow()

    one = adapters.attach(build("llama"), Adapter(method="adalora", r=2, first_r=4), seed=0)
    whole = allocation.of(one, 40)
    assert whole is not None
    trained(one, whole, range(20))
    other = adapters.attach(build("llama"), Adapter(method="adalora", r=2, first_r=4), seed=0)
    again = allocation.of(other, 40)
    assert again is not None
    other.load_state_dict(one.state_dict())
    for name, tensor in again.tensors().items():
        tensor.copy_(whole.tensors()[name])
    again.go_on()
    trained(one, whole, range(20, 40))
    trained(other, again, range(20, 40))
    assert whole.ranks() == again.ranks() and len(set(whole.ranks())) > 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_killed_run_takes_the_same_ranks_away(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Killed before, while and after ranks are taken away; ends with the bits of the run that nobody killed."""
    start = started(smoke_run, tmp_path, "corpus", "tiny", "news")
    how: dict[str, Any] = {"overrides": {"stages": {"sft": SFT}}, "only": ["sft"]}
    unkilled = start("unkilled")
    moments = [m for m in reference(forks, unkilled, **how) if "step-" in m]
    assert die_at_each(forks, moments[:: max(1, len(moments) // 6)], start, unkilled, **how) >= 4
