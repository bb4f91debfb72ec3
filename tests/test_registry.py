"""Names to functions, and what every registered loss owes by existing."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from temper.errors import RecipeError
from temper.losses import Terms, token_losses
from temper.registry import Registry


@pytest.fixture
def shapes() -> Registry:
    found: Registry[Any] = Registry("shape")

    @found.register("box")
    def box(data: list, *, side: float = 1.0, colour: Literal["red", "blue"] = "red", tags: list[str] | None = None):
        """A box."""
        return side

    @found.register("ball")
    def ball(data: list, *, radius: float):
        """A ball."""
        return radius

    return found


def test_names_in_order_and_by_get(shapes: Registry) -> None:
    assert list(shapes) == ["ball", "box"] and "box" in shapes and "cone" not in shapes
    assert shapes.get("ball")([], radius=2) == 2


def test_an_unknown_name_offers_the_nearest(shapes: Registry) -> None:
    with pytest.raises(RecipeError, match="there is no shape «bxo»") as error:
        shapes.get("bxo", where="r.yaml:3")
    assert error.value.do == "did you mean «box»?" and error.value.where == "r.yaml:3"
    with pytest.raises(RecipeError) as error:
        shapes.get("tetrahedron")
    assert error.value.do == "known: ball, box"


def test_keyword_parameters_are_the_configuration(shapes: Registry) -> None:
    assert {k: d for k, (_, d) in shapes.options("box").items()} == {"side": 1.0, "colour": "red", "tags": None}
    assert shapes.options("box")["side"][0] is float


def test_configurations_are_checked_and_filled_in(shapes: Registry) -> None:
    assert shapes.check("box", {"side": 3}) == {"side": 3.0, "colour": "red", "tags": None}
    assert type(shapes.check("box", {"side": 3})["side"]) is float
    with pytest.raises(RecipeError, match="has no option «sied»") as error:
        shapes.check("box", {"sied": 3})
    assert error.value.do == "did you mean «side»?"
    with pytest.raises(RecipeError, match="needs «radius»"):
        shapes.check("ball", {})
    for wrong in ({"side": "wide"}, {"colour": "green"}, {"tags": "a"}):
        with pytest.raises(RecipeError, match="does not fit"):
            shapes.check("box", wrong)


def test_a_name_is_given_once(shapes: Registry) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        shapes.register("box")(lambda data: None)
    assert shapes.get("box").__doc__ == "A box."


# Contracts of losses


def call(name: str, logps: torch.Tensor, weights: torch.Tensor) -> Terms:
    return token_losses.get(name)(logps, weights, **token_losses.check(name, {}))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return -torch.rand(9, generator=draw, dtype=torch.float64) * 5, torch.tensor(
        [1.0, 0, 2, 1, 0.5, 1, 0, 1, 3]
    ).double()


@pytest.mark.parametrize("name", list(token_losses))
def test_a_loss_gives_unreduced_terms(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logps, weights = batch
    before = logps.clone(), weights.clone()
    terms = call(name, logps.requires_grad_(), weights)
    assert terms.values.shape == terms.weights.shape == logps.shape
    assert terms.values.requires_grad and not terms.weights.requires_grad
    assert all(not extra.requires_grad and extra.shape == logps.shape for extra in terms.extras.values())
    assert torch.equal(logps, before[0]) and torch.equal(weights, before[1]), "pure: arguments are not changed"


@pytest.mark.parametrize("name", list(token_losses))
def test_a_loss_does_not_depend_on_the_cut(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logps, weights = batch
    whole = call(name, logps, weights)
    for cut in (1, 4, 8):
        parts = [call(name, lp, w) for lp, w in zip(logps.split(cut), weights.split(cut), strict=True)]
        assert torch.allclose(torch.cat([p.values for p in parts]), whole.values)
        assert torch.allclose(torch.cat([p.weights for p in parts]), whole.weights)


@pytest.mark.parametrize("name", list(token_losses))
def test_tokens_without_weight_teach_nothing(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logps, weights = batch
    terms = call(name, logps.requires_grad_(), weights)
    (slope,) = torch.autograd.grad((terms.values * terms.weights).sum(), logps)
    assert torch.equal(slope == 0, weights == 0)
    assert (slope[weights > 0] < 0).all(), "a step makes trained tokens likelier"


@pytest.mark.parametrize("name", list(token_losses))
def test_gradients_are_those_of_finite_differences(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logps, weights = batch
    assert torch.autograd.gradcheck(
        lambda x: (lambda t: (t.values * t.weights).sum())(call(name, x, weights)), logps.requires_grad_()
    )


def test_nll_is_minus_the_log_probability(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logps, weights = batch
    terms = call("nll", logps, weights)
    by_hand = sum(-lp * w for lp, w in zip(logps.tolist(), weights.tolist(), strict=True)) / sum(weights.tolist())
    assert float((terms.values * terms.weights).sum() / terms.weights.sum()) == pytest.approx(by_hand)
