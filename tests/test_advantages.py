"""Advantages: by hand, against TRL's formulas in float64, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from temper.advantages import advantages, baseline, group, leave_one_out, over_batch, without_variance

REWARDS = np.array([[0.1, 0.9, 0.4, 0.4], [1.0, 0.0, 0.25, 0.5]])
GROUPS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6), elements=st.floats(-5, 5))


def test_group_equals_trls_formula_in_float64() -> None:
    rewards = torch.tensor(REWARDS)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, keepdim=True) + 1e-4)
    assert np.allclose(group(REWARDS).advantage(REWARDS), expected.numpy(), atol=1e-12)
    expected = centred / (rewards.std() + 1e-4)
    assert np.allclose(group(REWARDS, scale="batch").advantage(REWARDS), expected.numpy())


def test_leave_one_out_equals_trls_formula_in_float64() -> None:
    """As its RLOOTrainer writes it: the sum of the others over their number, and nothing where there are none."""
    found = np.array([[0.1, 0.9, np.nan, 0.4], [1.0, np.nan, np.nan, np.nan]])
    rewards = torch.tensor(found)
    scored = (~rewards.isnan()).sum(1, keepdim=True)
    expected = rewards - (torch.nansum(rewards, 1, keepdim=True) - rewards) / (scored - 1)
    expected[(scored < 2).expand_as(expected)] = torch.nan
    got = leave_one_out(found).advantage(found)
    assert np.allclose(got, np.nan_to_num(expected.numpy())) and got[1].tolist() == [0, 0, 0, 0]


@given(rewards=GROUPS, constant=st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards: np.ndarray, constant: float) -> None:
    for rule in (leave_one_out, lambda r: group(r, scale="none"), lambda r: baseline(r, mean="batch")):
        moved = rewards + constant
        assert np.allclose(rule(moved).advantage(moved), rule(rewards).advantage(rewards), atol=1e-9)


@given(rewards=GROUPS)
def test_leave_one_out_is_the_group_times_k_over_k_minus_1(rewards: np.ndarray) -> None:
    k = rewards.shape[1]
    expected = group(rewards, scale="none").advantage(rewards) * k / (k - 1)
    assert np.allclose(leave_one_out(rewards).advantage(rewards), expected, atol=1e-9)


@given(rewards=GROUPS, seed=st.integers(0, 99))
def test_leave_one_out_does_not_depend_on_the_completion_itself(rewards: np.ndarray, seed: int) -> None:
    p, i = seed % len(rewards), seed % rewards.shape[1]
    before = leave_one_out(rewards).mean[p, i]
    changed = rewards.copy()
    changed[p, i] += 10
    assert leave_one_out(changed).mean[p, i] == pytest.approx(before)


def test_the_baselines_of_reinforce() -> None:
    assert np.array_equal(baseline(REWARDS, mean="none").advantage(REWARDS), REWARDS)
    assert np.allclose(baseline(REWARDS, 0.3).advantage(REWARDS), REWARDS - 0.3)
    assert np.allclose(baseline(REWARDS).advantage(REWARDS), REWARDS - REWARDS.mean()), "the first rollout has its own"
    one = np.array([[0.7]])
    assert baseline(one, 0.2).advantage(one)[0, 0] == pytest.approx(0.5), "one completion is enough"


def test_global_normalisation_has_mean_0_and_deviation_1() -> None:
    for mean in ("batch", "group"):
        got = over_batch(REWARDS, mean=mean).advantage(REWARDS)  # type: ignore[arg-type]
        assert got.mean() == pytest.approx(0, abs=1e-12) and got.std(ddof=1) == pytest.approx(1, abs=1e-3)
        assert np.allclose(got.mean(axis=1), 0, atol=1e-12) == (mean == "group")


@pytest.mark.parametrize("name", advantages)
def test_a_reward_that_is_missing_takes_no_part(name: str) -> None:
    rule = advantages.get(name)
    rewards = np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, np.nan], [np.nan, 2.0, np.nan]])
    found = rule(rewards).advantage(rewards)
    assert (found[np.isnan(rewards)] == 0).all() and np.isfinite(found).all()
    assert found[0, 0] > found[0, 2]
    nothing = np.full((2, 2), np.nan)
    assert rule(nothing).advantage(nothing).tolist() == [[0, 0], [0, 0]]
    one = np.array([[0.5]])  # a batch of one, at the end of an epoch
    assert np.isfinite(rule(one).advantage(one)).all()


def test_groups_that_say_nothing() -> None:
    rewards = np.array([[1.0, np.nan, 0.0], [np.nan] * 3, [np.nan, 2.0, np.nan]])
    assert without_variance(rewards).tolist() == [False, True, True]
    assert group(rewards, scale="none").advantage(rewards).tolist() == [[0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]]
