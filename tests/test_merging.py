"""Merge rules against formulas written out, PEFT's own, and what must hold of any task vectors; folders of models."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as pefts
from transformers import AutoModelForCausalLM

from temper import merging
from temper.errors import ModelError
from temper.merging import rules
from temper.models import folders
from tiny_models import TREES, build

NUMBERS = st.integers(0, 2**31)


def vectors(count: int, seed: int, size: int = 12) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(3, size // 3, generator=noise, dtype=torch.float64) for _ in range(count)]


def of_paper(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Ramé et al. 2024, equation SLERP."""
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


@given(NUMBERS, st.floats(0, 1), st.floats(0.1, 10))
def test_slerp_of_two_is_warps_formula(seed: int, share: float, longer: float) -> None:
    a, b = vectors(2, seed)
    b = b * longer
    found = merging.slerp([a, b], [1 - share, share])
    assert torch.allclose(found, of_paper(a, b, share), atol=1e-9, rtol=1e-9)


@given(NUMBERS)
def test_slerp_begins_and_ends_at_its_ends(seed: int) -> None:
    a, b = vectors(2, seed)
    assert torch.equal(merging.slerp([a, b], [1, 0]), a) and torch.equal(merging.slerp([a, b], [0, 1]), b)


@given(NUMBERS, st.integers(2, 6))
def test_slerp_of_equal_vectors_is_that_vector(seed: int, count: int) -> None:
    [a] = vectors(1, seed)
    assert torch.allclose(merging.slerp([a] * count), a, atol=1e-12)


@settings(max_examples=25)
@given(NUMBERS, st.integers(3, 5))
def test_slerp_does_not_depend_on_the_order(seed: int, count: int) -> None:
    given_, share = vectors(count, seed), [1.0, 2.0, 0.5, 3.0, 1.5][:count]
    first = merging.slerp(given_, share)
    for order in itertools.islice(itertools.permutations(range(count)), 0, None, 5):
        found = merging.slerp([given_[k] for k in order], [share[k] for k in order])
        assert torch.allclose(found, first, atol=1e-9)


@given(NUMBERS, st.integers(2, 6))
def test_slerp_keeps_the_length_where_all_have_it(seed: int, count: int) -> None:
    given_ = [3 * v / v.norm() for v in vectors(count, seed, size=60)]
    assert merging.slerp(given_).norm() == pytest.approx(3, abs=1e-9)
    assert merging.lerp(given_).norm() < 3


@given(NUMBERS, st.integers(3, 5))
def test_slerp_of_many_is_the_point_with_least_squared_angles(seed: int, count: int) -> None:
    """Of the directions: any step away on the sphere makes Σ θ² larger."""
    units = [v / v.norm() for v in vectors(count, seed, size=60)]
    mean = merging.slerp(units)

    def spread(u: torch.Tensor) -> float:
        return sum(math.acos(max(-1.0, min(1.0, float((u * v).sum() / u.norm())))) ** 2 for v in units)

    for other in (*units, *vectors(4, seed + 1, size=60)):
        assert spread(mean) <= spread(mean + 1e-3 * other) + 1e-12


def test_three_at_right_angles_by_hand() -> None:
    """The mean lies at acos(1/√3) from each: 1/√3 of every unit vector, and so of vectors of whatever lengths."""
    found = merging.slerp([torch.tensor([3.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 2.0])])
    assert found.tolist() == pytest.approx([3 / 3**0.5, 1 / 3**0.5, 2 / 3**0.5])


def test_directions_that_are_hardly_different_opposite_or_none() -> None:
    a = torch.tensor([1.0, 2.0, -2.0])
    near = a + torch.tensor([1e-7, 0, 0])
    zero = torch.zeros(3)
    assert torch.allclose(merging.slerp([a, near]), a, atol=1e-6)
    assert torch.allclose(merging.slerp([a, 2 * a]), 1.5 * a)
    assert torch.allclose(merging.slerp([a, -a]), zero), "no direction is the mean: the average"
    assert torch.allclose(merging.slerp([a, -3 * a], [3, 1]), zero)
    assert torch.allclose(merging.slerp([a, -a + 1e-5]), merging.lerp([a, -a + 1e-5]))
    assert torch.allclose(merging.slerp([a, zero]), a / 2), "one that did not move is averaged"
    assert torch.equal(merging.slerp([zero, zero]), zero)
    thirds = [torch.tensor([math.cos(x), math.sin(x)]) for x in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert merging.slerp(thirds).norm() < 1e-6


@given(NUMBERS, st.sampled_from([0.3, 0.5, 0.9]))
def test_ties_dare_and_task_arithmetic_are_pefts(seed: int, density: float) -> None:
    given_, factor = [v.float() for v in vectors(3, seed)], [1.0, 0.5, -2.0]
    weights = torch.tensor(factor)
    assert torch.allclose(merging.ties(given_, factor, density=density), pefts.ties(given_, weights, density))
    assert torch.allclose(merging.task_arithmetic(given_, factor), pefts.task_arithmetic(given_, weights))
    torch.manual_seed(zlib.crc32(b"7 a.weight"))
    expected = pefts.dare_linear(given_, weights, density)
    assert torch.allclose(merging.dare(given_, factor, "a.weight", density=density, seed=7), expected)


def test_dare_keeps_the_average_and_drops_by_tensor() -> None:
    given_ = [torch.ones(20000), 3 * torch.ones(20000)]
    found = merging.dare(given_, density=0.5)
    assert float(found.mean()) == pytest.approx(2, abs=0.05)
    assert set(found.tolist()) == {0.0, 1.0, 3.0, 4.0}
    again, other = (merging.dare(given_, None, n, density=0.5) for n in ("", "another"))
    assert torch.equal(found, again) and not torch.equal(found, other)


@pytest.mark.parametrize("name", rules)
def test_every_rule_takes_the_same_and_leaves_its_input_alone(name: str) -> None:
    given_ = vectors(3, 1)
    copies = [v.clone() for v in given_]
    found = rules.get(name)(given_, None, "w")
    assert found.shape == given_[0].shape and found.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(given_, copies, strict=True))


def test_weights_that_fit_no_rule_are_told() -> None:
    with pytest.raises(ModelError, match="for 2 models"):
        merging.lerp(vectors(2, 0), [1.0])
    with pytest.raises(ModelError, match="no shares"):
        merging.slerp(vectors(2, 0), [2.0, -1.0])


# Folders


def saved(folder: Path, seed: int, kind: str = "llama", **fields: Any) -> Path:
    """A model with random weights, in several files."""
    model = build(kind, seed=seed)
    if fields:
        model = type(model)(type(model.config)(**{**TREES[kind][1], **fields}))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_a_folder_of_shards_and_tied_weights_is_merged_as_in_memory(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(k), k, "gpt2") for k in range(3)]
    assert len(list(paths[0].glob("*.safetensors"))) > 1
    folders.merge(paths[0], paths[1:], tmp_path / "out", lambda d, n: merging.slerp(d), eta=0.3)
    start, one, two = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in paths)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert found.lm_head.weight is found.transformer.wte.weight
    for name, value in found.state_dict().items():
        a, b, s = one[name].double(), two[name].double(), start[name].double()
        moved = of_paper(a - s, b - s, 0.5) if (a - s).any() and (b - s).any() else (a + b) / 2 - s
        assert torch.allclose(value.double(), s + 0.3 * moved, atol=1e-6), name


def test_interpolation_ends_at_both_ends_bit_for_bit(tmp_path: Path) -> None:
    a, b = (saved(tmp_path / str(k), k) for k in range(2))
    for eta, end in ((0.0, a), (1.0, b)):
        folders.interpolate(a, b, tmp_path / str(eta), eta)
        for name in folders.Tensors(end).shapes:
            assert torch.equal(folders.Tensors(tmp_path / str(eta))[name], folders.Tensors(end)[name])
    folders.interpolate(a, b, tmp_path / "half", 0.5)
    name = next(iter(folders.Tensors(a).shapes))
    half = (folders.Tensors(a)[name] + folders.Tensors(b)[name]) / 2
    assert torch.allclose(folders.Tensors(tmp_path / "half")[name], half)


def test_half_precision_gives_way_to_the_finer_of_two(tmp_path: Path) -> None:
    """A small task vector would round away in bfloat16."""
    base = build("llama", seed=0).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "start")
    base.float().save_pretrained(tmp_path / "tuned")
    folders.merge(tmp_path / "start", [tmp_path / "tuned"], tmp_path / "out", lambda d, n: merging.lerp(d))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_models_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    start = saved(tmp_path / "start", 0)
    wide = saved(tmp_path / "wide", 0, intermediate_size=64)
    deep = saved(tmp_path / "deep", 0, num_hidden_layers=3)
    other = saved(tmp_path / "other", 0, "gpt2")
    for folder, what in ((wide, "different shapes"), (deep, "same tensors"), (other, "cannot be merged with")):
        with pytest.raises(ModelError, match=what):
            folders.merge(start, [folder], tmp_path / "out", lambda d, n: merging.lerp(d))


def test_angles_are_those_of_the_whole_task_vectors(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(k), k) for k in range(3)]
    flat = [torch.cat([t[n].flatten() for n in t.shapes]).double() for t in map(folders.Tensors, paths)]
    a, b = flat[1] - flat[0], flat[2] - flat[0]
    cosine, norms = folders.angles(paths[0], paths[1:])
    assert cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
    assert norms == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-6)
