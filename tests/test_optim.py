"""Optimisers by hand and schedules against transformers'."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from temper.engine import optim
from temper.errors import ModelError, RecipeError

PLANS = st.integers(1, 400).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps)))


@given(PLANS, st.sampled_from(list(optim.schedules)))
def test_every_schedule_rises_then_does_not_rise(plan: tuple[int, int], name: str) -> None:
    steps, warmup = plan
    rates = [optim.schedules.get(name)(step, steps, warmup) for step in range(steps)]
    assert all(0 < r <= 1 for r in rates), "no step is taken at a rate of zero"
    rise, fall = rates[: warmup + 1], rates[warmup:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    if warmup < steps:
        assert rates[warmup] == 1
    assert max((abs(b - a) for a, b in itertools.pairwise(rise)), default=0) <= 1 / (warmup + 1) + 1e-12


@pytest.mark.parametrize(
    ("name", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_after_warm_up_as_in_transformers(name: str, theirs) -> None:
    """During it they begin at a rate of zero, which wastes a step."""
    steps, warmup = 57, 9
    adam = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = theirs(adam, warmup, steps).lr_lambdas[0]
    ours = optim.schedules.get(name)
    assert [ours(s, steps, warmup) for s in range(warmup, steps)] == pytest.approx(
        [schedule(s) for s in range(warmup, steps)]
    )
    assert [ours(s, steps, warmup) for s in range(warmup)] == pytest.approx([(s + 1) / 10 for s in range(9)])


def test_a_floor_is_where_schedules_end() -> None:
    for name in ("cosine", "linear"):
        schedule = optim.schedules.get(name)
        assert schedule(100, 100, 0, floor=0.1) == pytest.approx(0.1)
        assert schedule(0, 100, 0, floor=0.1) == pytest.approx(1.0)
        assert schedule(50, 100, 0, floor=0.1) == pytest.approx(0.55)


def test_warm_up_in_steps_or_as_a_share() -> None:
    assert [optim.warmup_steps(w, 200) for w in (0, 0.03, 0.5, 1, 7, 7.0)] == [0, 6, 100, 1, 7, 7]


def test_wsd_by_hand() -> None:
    """20 steps: 4 of warm-up, stable until 15, then five down to 0.1; and its decay in steps."""
    rate = optim.rate_of({"wsd": {"decay": 0.25, "floor": 0.1}}, 20, 4)
    rates = [rate(step, []) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    in_steps = optim.rate_of({"wsd": {"decay": 5, "floor": 0.1}}, 20, 4)
    assert [in_steps(step, []) for step in range(20)] == rates
    crowded = optim.rate_of({"wsd": {"decay": 0.9}}, 10, 4)  # warm-up and decay overlap: the decay is the shorter
    assert [crowded(step, []) for step in (3, 4, 7, 9)] == pytest.approx([0.8, 1.0, 0.5, 1 / 6])


@given(
    st.lists(st.floats(0.1, 10), max_size=40),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 4),
    st.sampled_from([0.0, 1e-4, 0.3]),
    st.sampled_from([0.0, 0.2]),
)
def test_plateau_as_in_torch(losses: list[float], factor: float, patience: int, threshold: float, floor: float) -> None:
    adam = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, factor=factor, patience=patience, threshold=threshold, min_lr=floor, eps=0
    )
    options = {"factor": factor, "patience": patience, "threshold": threshold, "floor": floor}
    ours = optim.rate_of({"plateau": options}, 100, 0)
    for k, loss in enumerate(losses, 1):
        theirs.step(loss)
        assert ours(50, losses[:k]) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)


def test_a_schedule_is_a_name_or_a_name_with_options() -> None:
    assert (
        optim.named("cosine")
        == optim.named({"cosine": {}})
        == optim.named({"cosine": None})
        == ("cosine", {"floor": 0.0})
    )
    assert optim.rate_of({"linear": {"floor": 0.2}}, 10, 0)(10, []) == pytest.approx(0.2)
    for wrong, what in [
        ("cosin", "no schedule «cosin»"), ({"wsd": {"decya": 1}}, "no option «decya»"), ({"wsd": {"decay": 0}}, "does not fit"),
        ({"plateau": {"factor": 1.5}}, "does not fit"), ({"wsd": {}, "cosine": {}}, "not one schedule"), ({}, "not one schedule"),
    ]:  # fmt: skip
        with pytest.raises(RecipeError, match=what):
            optim.named(wrong)


def one(name: str, value: list[float], slopes: list[list[float]], lr: float, decay: float) -> list[list[float]]:
    parameter = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))
    optimizer = optim.optimizers.get(name)(optim.groups([("w", parameter)], lr, decay))
    out = []
    for slope in slopes:
        parameter.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.step()
        out.append(parameter.detach()[0].tolist())
    return out


def test_adamw_by_hand() -> None:
    value, slopes, lr, decay = [1.0, -2.0], [[0.5, 4.0], [-0.25, 2.0], [1.0, -1.0]], 0.1, 0.2
    w, m, v = list(value), [0.0, 0.0], [0.0, 0.0]
    expected = []
    for t, slope in enumerate(slopes, 1):
        for i, g in enumerate(slope):
            w[i] *= 1 - lr * decay
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            w[i] -= lr * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)) ** 0.5 + 1e-8)
        expected.append(list(w))
    for got, want in zip(one("adamw", value, slopes, lr, decay), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


def test_sgd_by_hand() -> None:
    found = one("sgd", [1.0], [[0.5], [2.0]], 0.1, 0.0)
    assert [w for (w,) in found] == pytest.approx([0.95, 0.75])


def test_adafactor_by_hand() -> None:
    """Shazeer and Stern 2018, algorithm 4: of a matrix of one row the factored second moment is that of each column."""
    value, slopes, lr = [1.0, -2.0], [[0.5, 4.0], [-0.25, 2.0], [1.0, -1.0]], 0.1
    w, row, columns, expected = np.array(value), 0.0, np.zeros(2), []
    for t, slope in enumerate(np.array(slopes), 1):
        kept = 1 - t**-0.8
        row = kept * row + (1 - kept) * (slope**2).mean()
        columns = kept * columns + (1 - kept) * slope**2
        update = slope / np.sqrt(columns * row / row)
        update /= max(1.0, np.sqrt((update**2).mean()))
        w = w - min(lr, t**-0.5) * max(1e-3, np.sqrt((w**2).mean())) * update
        expected.append(w.tolist())
    for got, want in zip(one("adafactor", value, slopes, lr, 0.0), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-6)


def test_frozen_parameters_are_in_no_group() -> None:
    trained, frozen, bias = (torch.nn.Parameter(torch.zeros(s)) for s in ((2, 2), (2, 2), (2,)))
    frozen.requires_grad = False
    found = optim.groups([("a", trained), ("b", frozen), ("c", bias)], 1e-3, 0.1)
    assert [[id(p) for p in g["params"]] for g in found] == [[id(trained)], [id(bias)]]
    assert optim.groups([("c", bias)], 1e-3, 0.1) == [{"params": [bias], "lr": 1e-3, "weight_decay": 0.0}]


def test_eight_bits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(ModelError, match="needs bitsandbytes") as error:
        optim.optimizers.get("adamw_8bit")([])
    assert "pip install" in error.value.do


def test_moments_in_eight_bits_step_as_adamw_does() -> None:
    """Within what eight bits round: on a quadratic bowl both come down alike."""
    torch.manual_seed(0)
    start, ends = torch.randn(128, 64), []
    for name in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optim.optimizers.get(name)([{"params": [weight], "lr": 1e-2, "weight_decay": 0.0}])
        for _ in range(30):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    assert float((ends[0] - start).norm()) > 10
    assert float((ends[1] - ends[0]).norm() / (ends[0] - start).norm()) < 0.05


def test_an_unknown_optimiser_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match="there is no optimizer «adam»") as error:
        optim.optimizers.get("adam")
    assert "adamw" in error.value.do
