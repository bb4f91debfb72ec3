"""The distribution that is sampled from against transformers' own processors, and the draw against arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from temper.errors import ModelError
from temper.models.products import sound
from temper.rollouts import distribution, products
from temper.rollouts.decoding import Decoding
from temper.rollouts.distribution import CANDIDATES, draw, uniforms, warped

ROWS, VOCABULARY = 6, 3000


def logits(spread: float = 2.0) -> torch.Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


def transformers_own(scores: torch.Tensor, context: torch.Tensor, d: Decoding) -> torch.Tensor:
    made: list[Any] = []
    if d.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(d.repetition_penalty))
    made.append(TemperatureLogitsWarper(d.temperature))
    if d.top_k is not None:
        made.append(TopKLogitsWarper(d.top_k))
    if d.top_p < 1:
        made.append(TopPLogitsWarper(d.top_p))
    if d.min_p > 0:
        made.append(MinPLogitsWarper(d.min_p))
    return LogitsProcessorList(made)(context, scores.clone()).softmax(-1)


SETTINGS: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_transformers(settings: dict[str, Any], spread: float) -> None:
    decoding = Decoding(**{"temperature": 1.0, **settings})
    scores = logits(spread)
    untouched = scores.clone()
    context = torch.randint(0, VOCABULARY, (ROWS, 50), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter_(1, context, True)
    expected = transformers_own(scores, context, decoding)
    found = warped(scores, decoding, seen).softmax(-1)
    assert torch.allclose(found, expected, atol=1e-7, rtol=1e-4)
    assert torch.equal(found > 0, expected > 0)
    assert torch.equal(scores, untouched)
    noise = torch.from_numpy(uniforms(ROWS, 1))
    tokens, logps, raw = draw(scores, noise, decoding, seen)
    at = tokens[:, None]
    assert torch.allclose(logps, expected.gather(-1, at)[:, 0].log(), atol=1e-5)
    assert torch.allclose(raw.double(), scores.double().log_softmax(-1).gather(-1, at)[:, 0], atol=1e-5)


def test_a_nucleus_wider_than_the_candidates() -> None:
    """Among settings above: some rows find their nucleus among the candidates, flat ones are sorted whole."""
    scores = torch.cat([logits(0.1)[:3], logits(8.0)[3:]])
    kept = (warped(scores, Decoding(temperature=1.0, top_p=0.9)) > -torch.inf).sum(-1)
    assert bool((kept[:3] > CANDIDATES).all()) and bool((kept[3:] < CANDIDATES).all())
    expected = transformers_own(scores, torch.zeros(ROWS, 1, dtype=torch.long), Decoding(temperature=1.0, top_p=0.9))
    assert torch.equal(kept, (expected > 0).sum(-1))


@pytest.mark.parametrize("vocabulary", [7, 256, 700])
def test_every_token_comes_as_often_as_it_is_likely(vocabulary: int) -> None:
    """Noise at the middles of n equal parts of [0, 1) finds each token n·p times, but for one part at each end."""
    n = 40_000
    scores = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(2)) * 2
    scores[0, [0, vocabulary - 1]] = -torch.inf
    noise = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logps, _ = draw(scores.expand(n, -1), noise, Decoding(temperature=1.0))
    likely = scores[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert (counts - n * likely).abs().max() < 1.01
    assert torch.equal(tokens, tokens.sort().values)  # the inverse of a running sum rises
    assert torch.allclose(logps.double(), likely[tokens].log(), atol=1e-5)


def test_what_is_ruled_out_is_never_drawn() -> None:
    """Not even at the ends of the interval, where rounding could carry the noise past the last token."""
    for vocabulary in (5, 256, 1000):
        for allowed in ([0], [vocabulary - 1], [1, 3], [vocabulary // 2]):
            scores = torch.full((3, vocabulary), -torch.inf)
            scores[:, allowed] = torch.tensor([0.3 * k for k in range(len(allowed))])
            noise = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
            tokens, logps, _ = draw(scores, noise, Decoding(temperature=1.0))
            assert set(tokens.tolist()) <= set(allowed) and tokens[0] == allowed[0] and tokens[2] == allowed[-1]
            assert torch.isfinite(logps).all()


@pytest.mark.parametrize("size", [1, 255, 256, 594, 151_936])
def test_running_sums_by_products(size: int) -> None:
    """What graphics cards compute instead of `cumsum`; a token that adds nothing leaves the sum as it is."""
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(3, size, generator=draw, dtype=torch.float64) * (torch.rand(3, size, generator=draw) > 0.3)
    got, expected = distribution._by_triangles(values), values.cumsum(-1)
    assert got.shape == values.shape
    assert (got - expected).abs().max() <= 1e-13 * max(1.0, float(expected.max()))
    inside = torch.arange(1, size) % distribution.BLOCK != 0
    still = (values[:, 1:] == 0) & inside
    assert torch.equal(got[:, 1:][still], got[:, :-1][still])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_are_an_error(temperature: float, bad: float) -> None:
    scores = logits()
    scores[2, 1700] = bad
    with pytest.raises(ModelError, match="not numbers"):
        draw(scores, torch.full((ROWS,), 0.5, dtype=torch.float64), Decoding(temperature=temperature))


def test_the_noise_is_splitmix64() -> None:
    """The generator's published first outputs from seed 1234567."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * distribution._GAMMA
    assert distribution._mixed(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_streams_are_uniform_and_apart() -> None:
    keys = [(seed, step, prompt, k) for seed in range(2) for step in range(3) for prompt in range(5) for k in range(4)]
    streams = np.stack([uniforms(200, *key) for key in keys])
    assert streams.min() >= 0 and streams.max() < 1 and len(np.unique(streams)) == streams.size
    counts = np.histogram(streams, 20, (0, 1))[0]
    expected = streams.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # the 0.999 quantile of chi-square with 19
    between = np.corrcoef(streams)[np.triu_indices(len(keys), 1)]
    assert abs(between).max() < 0.35 and abs(between.mean()) < 0.005
    assert np.array_equal(uniforms(3, -1, 2**63), uniforms(3, -1, 2**63))


def exactly(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 64, 200])
def test_packed_linears_give_the_same_and_leave_no_trace(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 400, bias=bias).requires_grad_(False), torch.randn(rows, 1, 96)
    exact = exactly(layer, x)
    with products.packed_linears(layer):
        assert ("forward" in vars(layer)) == sound(torch.float32)
        got = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # not what was packed for
            assert layer(x).dtype == torch.bfloat16
    assert got.shape == exact.shape and got.dtype == torch.float32 and got.is_contiguous()
    assert float((got - exact).norm() / exact.norm()) < 2e-6
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("halves", [True, False])
def test_packed_linears_compute_in_bfloat16_where_the_usual_ones_would(halves: bool) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(256, 128).requires_grad_(False), torch.randn(8, 256)
    if halves:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not halves), torch.no_grad():
        usual = layer(x)
        with products.packed_linears(layer):
            got = layer(x)
    assert got.dtype == usual.dtype == torch.bfloat16
    assert float((got - usual).float().norm() / usual.float().norm()) < 4e-3  # the last bit
    exact = exactly(layer, x)
    assert float((got - exact).norm() / exact.norm()) < 1e-2


def test_packed_linears_follow_weights_that_change_between_uses_and_leave_others_alone() -> None:
    layer, x = torch.nn.Linear(256, 128), torch.randn(2, 256)
    for _ in range(2):
        with products.packed_linears(layer), torch.no_grad():
            got = layer(x)
        assert torch.allclose(got, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        torch.nn.init.normal_(layer.weight)
    small, replaced = torch.nn.Linear(8, 8), torch.nn.Linear(256, 128)
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with products.packed_linears(torch.nn.ModuleList([small, replaced])):
        assert "forward" not in vars(small) and replaced(x) is x
    assert replaced(x) is x


def test_a_machine_whose_packed_products_are_coarse_or_missing_keeps_the_usual_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = torch.ops.mkldnn._reorder_linear_weight

    def missing(*_: object) -> None:
        raise NotImplementedError("built without it")

    for name, kind in (("coarse", lambda w, rows: pack(w.bfloat16().to(w.dtype), rows)), ("missing", missing)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", kind)
            assert not sound.__wrapped__(torch.float32), name
    assert not sound(torch.float16)
