"""What `temper explain` and `temper list` say: against the stages and functions themselves."""

from __future__ import annotations

import pytest

from temper import fields
from temper.errors import RecipeError
from temper.recipe import stages
from temper.stages.rl import Rl


def test_the_list_has_everything_that_a_recipe_names() -> None:
    listed = fields.catalogue()
    for kind, name in [
        ("rewards", "regex"), ("algorithms", "grpo"), ("advantages", "group"), ("metrics", "lexicon"), ("losses", "nll"),
        ("optimizers", "sgd"), ("schedules", "linear"), ("stages", "rl"), ("data", "mini:uk-news"),
    ]:  # fmt: skip
        assert len(listed[kind][name]) > 10


@pytest.mark.parametrize("kind", list(stages))
def test_a_stage_begins_with_what_must_be_given(kind: str) -> None:
    lines = [line for line in fields.explain(kind).split("\n")[1:] if line.startswith("  ") and line[2] != " "]
    required = ["; required)" in line for line in lines]
    assert required == sorted(required, reverse=True) and len(lines) == len(stages.get(kind).model_fields)


def test_what_only_a_stage_has_stands_before_what_it_shares() -> None:
    names = [line.split()[0] for line in fields.explain("rl").split("\n")[1:] if line[2] != " "]
    assert names[:4] == ["data", "reward", "algorithm", "advantage"]
    assert names.index("kl") < names.index("epochs") < names.index("keep_checkpoints")


def test_a_mapping_lists_its_keys_with_their_defaults() -> None:
    shown = fields.explain("rl.kl")
    assert "    beta (number, ≥ 0; default 0.04): Weight of the KL term; 0: none." in shown.split("\n")
    assert "place (loss | reward; default loss)" in shown


def test_defaults_are_those_of_the_mapping_around_them() -> None:
    """Answers are greedy in evaluate and sampled in rl."""
    assert "in evaluate: default 0.0" in fields.explain("evaluate.decoding.temperature")
    assert f"default {Rl.model_fields['decoding'].default.temperature}" in fields.explain("rl.decoding.temperature")
    assert "default {temperature: 1.0}" in fields.explain("rl.decoding")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grpo.lr", "in rl: default 1e-05"),
        ("grpo.kl.beta", "in rl: default 0.04"),
        ("toxic_news.tries", "in generate: default 4"),
        ("judge.data", "in classifier: required"),  # a stage of a profile
        ("dr_grpo.epsilon", "dr_grpo, algorithm"),
    ],
)
def test_stages_are_explained_by_the_names_that_recipes_give_them(name: str, says: str) -> None:
    assert says in fields.explain(name)


@pytest.mark.parametrize(
    ("name", "near"), [("grpo.epsilonn", "«grpo.epsilon»"), ("toxic_news.trys", "«toxic_news.tries»")]
)
def test_the_nearest_key_of_a_named_stage_is_offered(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=near):
        fields.explain(name)


def test_functions_are_explained_with_their_options() -> None:
    assert (
        fields.explain("grpo").split("\n")[1].startswith("  epsilon (number; default 0.2): how far the ratio may fall")
    )
    metric, reward = fields.explain("rouge").split("\n\n")
    assert metric.startswith("rouge, metric: ROUGE-1") and "stem (true or false; default false): compare" in metric
    assert reward.startswith("rouge, reward: ") and "default rougeL)" in reward
    assert "target (whole number; required)" in fields.explain("length")
    field, advantage = fields.explain("group").split("\n\n")  # a column of data, and an advantage
    assert field.startswith("group: text") and "scale (group | batch | none; default group)" in advantage
    assert "lr" not in fields.explain("adamw")  # not an option: the recipe's own field
