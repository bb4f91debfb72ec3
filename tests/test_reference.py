"""The model that a policy is held close to: what stays, and what follows as an exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from temper.engine import checkpoint
from temper.models import adapters
from temper.models.adapters import Adapter
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.trees import Row, chain, join
from tiny_models import build

RATE = 0.2


def policy(kind: str, adapter: Adapter | None) -> Policy:
    hf = build(kind, seed=1)
    made = Policy(adapters.attach(hf, adapter, seed=3) if adapter else hf)
    made.eval()
    return made


def row() -> Row:
    return join([chain(list(range(3, 30)), [1.0] * 27)])


def steps(of: Policy, count: int) -> Iterator[None]:
    """Some noise on what is trained, as an optimiser would."""
    for k in range(count):
        torch.manual_seed(k)
        with torch.no_grad():
            for p in of.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn_like(p))
        yield


def product(of: Policy) -> dict[str, torch.Tensor]:
    """The whole weights that a policy stands for, in float64, by PEFT's own merge of a fresh copy."""
    hf = copy.deepcopy(of.hf)
    return {
        n: p.detach().double()
        for n, p in (hf.merge_and_unload() if hasattr(hf, "merge_and_unload") else hf).named_parameters()
    }


CASES = {
    "whole": ("llama", None),
    "tied": ("gpt2", None),
    "lora": ("llama", Adapter(r=4)),
    "transposed": ("gpt2", Adapter(r=4, rslora=True)),
    "dora": ("llama", Adapter(r=4, dora=True)),
    "experts": ("mixtral", Adapter(r=4)),
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("case", CASES)
def test_the_average_is_its_closed_form(case: str) -> None:
    """θ_ema(T) = (1 − μ)ᵀ·θ(0) + Σ μ·(1 − μ)ᵀ⁻ᵗ·θ(t), of whole weights; the policy is left as it was to the bit."""
    of = policy(*CASES[case])
    reference = Reference(of, RATE)
    seen, total = [product(of)], 5
    assert torch.allclose(reference(row()), of(row()), atol=1e-5)
    for _ in steps(of, total):
        before = [p.detach().clone() for p in of.parameters()]
        reference.follow()
        assert all(torch.equal(a, b) for a, b in zip(before, of.parameters(), strict=True))
        seen.append(product(of))
    assert reference.copy is not None
    found = dict(reference.copy.hf.named_parameters())
    assert set(found) == set(seen[0])
    for name in found:
        expected = (1 - RATE) ** total * seen[0][name]
        for t in range(1, total + 1):
            expected += RATE * (1 - RATE) ** (total - t) * seen[t][name]
        assert torch.allclose(found[name].double(), expected, atol=1e-6), name
    with torch.no_grad():
        assert (reference(row()) - of(row())).abs().max() > 1e-3, "it lags behind"


def test_the_average_of_an_adapter_is_not_the_adapter_of_averages() -> None:
    of = policy(*CASES["lora"])
    reference = Reference(of, RATE)
    factors = {n: p.detach().clone() for n, p in of.named_parameters() if p.requires_grad}
    for _ in steps(of, 4):
        reference.follow()
        for n, p in of.named_parameters():
            if p.requires_grad:
                factors[n].lerp_(p.detach(), RATE)
    with torch.no_grad():
        for n, p in of.named_parameters():
            if p.requires_grad:
                p.copy_(factors[n])
    assert (reference(row()) - of(row())).abs().max() > 1e-4


def test_what_an_adapter_leaves_alone_is_not_copied() -> None:
    of = policy("llama", Adapter(r=4, targets=["q_proj"]))
    reference = Reference(of, RATE)
    assert reference.copy is not None
    mine = {id(p) for p in reference.copy.parameters()} - {id(p) for p in of.parameters()}
    assert len(mine) == len(reference.tensors()) == 2


def test_a_checkpoint_holds_the_average_bit_for_bit(tmp_path: Path) -> None:
    of = policy(*CASES["lora"])
    reference = Reference(of, RATE)
    for _ in steps(of, 3):
        reference.follow()
    kept = {n: t.clone() for n, t in reference.tensors().items()}
    checkpoint.write(tmp_path / "step-3", of, None, {"step": 3}, reference.tensors())
    for _ in steps(of, 1):
        reference.follow()
    assert not all(torch.equal(t, kept[n]) for n, t in reference.tensors().items())
    checkpoint.read_follower(tmp_path / "step-3", reference.tensors())
    assert all(torch.equal(t, kept[n]) for n, t in reference.tensors().items())
    assert checkpoint.problem(tmp_path / "step-3") is None


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("case", CASES)
def test_one_that_stays_stays(case: str) -> None:
    of = policy(*CASES[case])
    reference = Reference(of)
    with torch.no_grad():
        before = of(row())
        for _ in steps(of, 2):
            reference.follow()
        assert torch.allclose(reference(row()), before, atol=1e-5)
    assert reference.tensors() == {}
