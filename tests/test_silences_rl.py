"""Silences of reinforcement learning, each staged. Numbers are those of the list of silences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from temper.errors import RecipeError, TrainingError
from temper.models import adapters
from temper.models.adapters import Adapter
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.stages import rl
from temper.trees import group, join
from test_rl import metrics, run
from tiny_models import attach_warm, build, warmed


class Words:
    """A tokenizer's part that the sampler asks for."""

    pad_token_id = 0


def shift(module: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_6_rollouts_follow_the_weights_that_are_trained() -> None:
    """Nothing of the weights is kept between two rollouts: after an update the samples are the new policy's."""
    torch.manual_seed(0)
    hf = adapters.attach(build("llama"), Adapter(r=4), seed=1)
    sampler, policy = Sampler(hf, Words(), end_ids=[]), Policy(hf)
    asked: dict[str, Any] = {"completions": 3, "seed": 5}
    prompt = [5, 6, 7, 8]
    before = sampler.sample([prompt], Decoding(max_new_tokens=12, temperature=1.0), **asked)[0]
    warmed(hf, 0.5)
    after = sampler.sample([prompt], Decoding(max_new_tokens=12, temperature=1.0), **asked)[0]
    assert [c.ids for c in after] != [c.ids for c in before]
    policy.eval()
    with torch.no_grad():
        own = policy(join([group(prompt, [c.ids for c in after])])).numpy()
    assert np.allclose(own, np.concatenate([c.logps for c in after]), atol=1e-4)


def test_6_a_sampler_with_other_weights_stops_the_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rl.Sampler

    def stale(hf: Any, tokenizer: Any, **more: Any) -> Any:
        other = copy.deepcopy(hf)
        shift(other, 0.1)
        return real(other, tokenizer, **more)

    monkeypatch.setattr(rl, "Sampler", stale)
    with pytest.raises(TrainingError, match="samples do not come from the policy"):
        run(tmp_path / "run", smoke_run)


def test_7_a_reference_that_is_not_the_policy_at_the_start_stops_the_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staged: an adapter that already does something, and a reference without it."""
    attach_warm(monkeypatch, 0.5)
    with pytest.raises(TrainingError, match="the reference is not the policy"):
        run(tmp_path / "run", smoke_run)


@pytest.mark.parametrize("adapter", [True, False])
def test_7_the_reference_stays_what_the_policy_was(adapter: bool) -> None:
    hf: Any = adapters.attach(build("gpt2"), Adapter(r=4), seed=1) if adapter else build("gpt2")
    policy = Policy(hf)
    policy.eval()
    row = join([group([5, 6, 7], [[8, 9, 10], [11, 12]])])
    with torch.no_grad():
        start = policy(row)
        reference = Reference(policy)
        assert torch.equal(reference(row), start)
        for name, p in policy.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        assert (policy(row) - start).abs().max() > 0.01
        assert torch.allclose(reference(row), start, atol=1e-6)


def test_14_completions_all_cut_and_rewards_all_equal_are_told(smoke_run: Path, tmp_path: Path) -> None:
    """Greedy sampling and groups of one are refused before anything runs: tests/test_rl.py."""
    stage = run(tmp_path / "cut", smoke_run, decoding={"max_new_tokens": 2, "temperature": 1.0}, max_steps=2)
    assert '"cut": 1.0' in (stage / "metrics.jsonl").read_text(encoding="utf-8")
    assert "cut by max_new_tokens" in (stage / "stage.json").read_text(encoding="utf-8")
    with pytest.raises(TrainingError, match="every advantage is 0"):
        run(tmp_path / "equal", smoke_run, reward=[{"regex": {"pattern": "ніколи такого"}}])
    with pytest.raises(TrainingError, match=r"max_new_tokens \(2\) cut all completions, and mask_cut trains on none"):
        run(tmp_path / "masked", smoke_run, algorithm="dapo", decoding={"max_new_tokens": 2, "temperature": 1.0})


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_17_the_ratio_is_that_of_the_distribution_sampled_from(
    smoke_run: Path, tmp_path: Path, temperature: float
) -> None:
    """At another temperature than 1 the policy is scored at that temperature too: the first ratio is 1, and what was
    sampled has the log-probability that training finds."""
    stage = run(
        tmp_path / "run", smoke_run, decoding={"max_new_tokens": 10, "temperature": temperature}, max_steps=5
    )  # fmt: skip
    first = metrics(stage)[1][0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["sampling_gap"] < 1e-5
    for setting in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}):
        with pytest.raises(RecipeError, match="another distribution"):
            run(tmp_path / "refused", smoke_run, decoding={"max_new_tokens": 10, "temperature": 1.0, **setting})


def test_25_small_updates_reach_the_rollouts() -> None:
    """Samples come through the very weights that are trained, in float32. Staged beside it: a merged copy in bf16, which
    is what others sample from, and which rounds most of an early update away."""
    torch.manual_seed(0)
    hf: Any = adapters.attach(build("llama"), Adapter(r=4), seed=1)
    base = {n: p.detach().clone() for n, p in hf.get_base_model().named_parameters() if "lora" not in n}
    prompt, asked = [5, 6, 7, 8], Decoding(max_new_tokens=8, temperature=1.0)
    sampler = Sampler(hf, Words(), end_ids=[])
    before = sampler.sample([prompt], asked, completions=4)[0]
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if "lora_B" in name:
                p.fill_(2e-4)  # what a few steps of Adam at lr 1e-4 come to
    after = sampler.sample([prompt], asked, completions=4)[0]
    same = [(a.raw, b.raw) for a, b in zip(before, after, strict=True) if a.ids == b.ids]
    assert not same or any(not np.array_equal(a, b) for a, b in same)
    policy = Policy(hf)
    policy.eval()
    with torch.no_grad():
        own = policy(join([group(prompt, [c.ids for c in after])])).numpy()
    assert np.allclose(own, np.concatenate([c.raw for c in after]), atol=1e-5)
    merged = dict(hf.merge_and_unload().named_parameters())
    adapted = {n.replace(".base_layer", ""): p for n, p in base.items() if ".base_layer" in n}
    moved = [(merged[n].detach().bfloat16() != p.bfloat16()).float().mean().item() for n, p in adapted.items()]
    assert len(moved) > 5 and np.mean(moved) < 0.2, "a copy in bf16 would have lost most of it"
