"""Validation within its budget: planned, counted in a real run, and compared only with its like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import temper.stages  # noqa: F401  (registers them)
from temper import recipe as recipes
from temper.engine import checkpoint
from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.engine.validation import LEAST, SCORED, TRAINED, Plan, drawn, measure, plan
from temper.job import Job, Log
from temper.losses import Terms, nll
from temper.models.scores import Policy
from temper.trees import Row, Tree, chain, group, rows_of
from tiny_models import VOCABULARY, build


def chains(n: int, length: int, seed: int = 0) -> list[Tree]:
    """Examples of one length, the last half of each scored."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (n, length))
    weights = [0.0] * (length // 2) + [1.0] * (length - length // 2)
    return [chain(line.tolist(), weights, f"held:{k}") for k, line in enumerate(ids)]


def tokens(rows: list[Row]) -> int:
    return sum(len(t) for row in rows for t in row.trees)


PLANS = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 500),
        "trained": st.integers(1, 2_000_000),
        "budget": st.sampled_from([0.01, 0.05, 0.3, 1.0]),
        "every": st.one_of(st.none(), st.integers(1, 60)),
    }
)


@settings(max_examples=60, deadline=None)
@given(PLANS, st.lists(st.integers(2, 40), min_size=1, max_size=400), st.integers(0, 3))
def test_a_plan_stays_within_its_budget(given_: dict[str, Any], sizes: list[int], seed: int) -> None:
    trees = [chain([5] * n, [1.0] * n, str(k)) for k, n in enumerate(sizes)]
    held = rows_of(trees, 64, 256)
    made = plan(held, row_tokens=64, micro_tokens=256, seed=seed, **given_)
    steps = [s for s in range(1, given_["steps"] + 1) if s % made.every == 0 or s == given_["steps"]]
    cost = SCORED * (len(steps) * tokens(made.rows) + (tokens(held) if made.rest else 0))
    assert made.share == pytest.approx(cost / (cost + TRAINED * given_["trained"]))
    seen = sorted(int(t.origin) for row in [*made.rows, *made.rest] for t in row.trees)
    assert seen == list(range(len(sizes))), "each example is in the part or in the rest"
    if given_["every"] is not None:
        assert made.every == given_["every"] and made.whole
        assert bool(made.warning) == (made.share > given_["budget"] and len(steps) > 1)
    else:
        assert len(steps) <= 10 and not made.warning
        assert made.share <= given_["budget"] + 1e-12 or (len(steps) == 1 and made.whole)
        assert made.whole or sum(len(row.trees) for row in made.rows) >= LEAST


def test_the_part_is_drawn_by_the_seed_and_not_by_length() -> None:
    trees = [chain([5] * n, [1.0] * n, str(n)) for n in range(2, 402)]
    part, rest = drawn(trees, 20_000, 1)
    assert [t.origin for t in part] == [t.origin for t in drawn(trees, 20_000, 1)[0]]
    assert [t.origin for t in part] != [t.origin for t in drawn(trees, 20_000, 2)[0]]
    assert sum(map(len, part)) <= 20_000 < sum(map(len, part)) + max(map(len, rest))
    assert abs(np.mean([len(t) for t in part]) - 201.5) < 4 * 115.5 / len(part) ** 0.5


RECIPE = """
name: budget
model: nowhere
stages:
  data: {{stage: data, source: rows.jsonl, text: "{{text}}"}}
  sft: {{stage: sft, model: nowhere, data: data, schedule: constant, warmup: 0, precision: float32, {fields}}}
"""


def looped(folder: Path, fields: str, train: list[Tree], held: list[Tree], model: Any = None, **more: Any) -> Loop:
    """A loop in a folder, with a real job."""
    (folder / "recipe.yaml").write_text(RECIPE.format(fields=fields))
    (folder / "sft.partial").mkdir(exist_ok=True)
    job = Job(recipes.load(folder / "recipe.yaml"), "sft", folder / "sft.partial", {}, Log(None, quiet=True))
    job.start_clock()
    stage: Any = job.stage
    batches = Batches(train, stage.batch_size, stage.row_tokens, stage.micro_tokens, job.seed)
    rows = rows_of(held, stage.row_tokens, stage.micro_tokens)
    return Loop(job, Policy(model or build("llama")), nll, batches, stage, "float32", rows, **more)


def logged(loop: Loop) -> list[dict[str, Any]]:
    return [json.loads(line) for line in loop.metrics.read_text(encoding="utf-8").splitlines()]


def by_transformers(model: Any, trees: list[Tree]) -> float:
    """Mean loss a scored token of examples of one length."""
    ids = torch.from_numpy(np.stack([t.ids for t in trees])).long()
    labels = ids.clone()
    labels[:, : len(trees[0]) // 2] = -100
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=labels, use_cache=False).loss.item()


def test_where_naive_validation_takes_half_of_the_work_the_planned_one_stays_within_its_budget(tmp_path: Path) -> None:
    """Counted in the forward passes that really happened; and what each loss in the log is of."""
    train, held = chains(1320, 8), chains(400, 8, seed=1)
    fields = "batch_size: 132, lr: 3e-2, row_tokens: 512, micro_tokens: 4096, epochs: 3"
    naive = looped(tmp_path, fields + ", evaluate_every: 1", train, held)
    assert naive.plan.share == pytest.approx(0.5, abs=0.01)
    assert "evaluate_every: 1 makes validation 50% of all work" in naive.warnings()[0]
    model = build("llama")
    loop = looped(tmp_path, fields, train, held, model)
    assert loop.warnings() == []
    work = {True: 0, False: 0}

    def count(_: Any, args: tuple[Row], __: Any) -> None:
        work[torch.is_grad_enabled()] += args[0].tokens

    loop.policy.register_forward_hook(count)
    loop.run()
    spent = SCORED * work[False]
    share = spent / (spent + TRAINED * work[True])
    assert 0.04 < share <= 0.05
    assert loop.plan.share == pytest.approx(share)
    assert loop.job.facts["validation's share of all work"] == f"{share:.1%}"
    part = [t for row in loop.plan.rows for t in row.trees]
    assert LEAST <= len(part) < len(held)
    lines = [line for line in logged(loop) if "validation_loss" in line]
    assert len(lines) >= 3 and lines[-1]["step"] == 30
    best = min(lines, key=lambda line: line["validation_loss"])
    assert by_transformers(model, part) == pytest.approx(best["validation_loss"], rel=1e-5)
    (whole,) = (line for line in logged(loop) if "whole_validation_loss" in line)
    assert whole["step"] == best["step"]
    assert by_transformers(model, held) == pytest.approx(whole["whole_validation_loss"], rel=1e-5)
    again = looped(tmp_path, fields, train, held)  # killed after its last line: the whole pass is made once more
    again.run()
    assert [line for line in logged(again) if "whole_validation_loss" in line] == [whole]
    assert again.job.facts == loop.job.facts


def test_what_loses_by_the_part_is_not_best_whatever_the_whole_says(tmp_path: Path) -> None:
    """The rule: validations over the same rows are compared, and no others."""
    train, held = chains(40, 8), chains(6, 8, seed=2)
    loop = looped(tmp_path, "batch_size: 8, max_steps: 4, evaluate_every: 2, lr: 1e-2", train, held)
    loop.plan = Plan(2, rows_of(held[:3], 64, 64), rows_of(held[3:], 64, 64), 0.1)
    loop.run()
    found = {line["step"]: line["validation_loss"] for line in logged(loop) if "validation_loss" in line}
    assert loop.state["best"] == min(found.values()) and loop.state["losses"] == list(found.values())
    whole = [line for line in logged(loop) if line.get("whole")]
    assert len(whole) == 1 and whole[0]["step"] == loop.state["best_step"]
    assert not any("best" in line for line in whole)
    assert [p.name for p in checkpoint.bests(loop.root)] == [f"best-{loop.state['best_step']}"]


@pytest.mark.parametrize("row_tokens", [16, 64])
def test_the_examples_with_the_highest_loss(row_tokens: int) -> None:
    model = build("qwen3")
    trees = [*chains(30, 10), group([5, 6, 7], [[8, 9], [10]], "pair")]
    found = measure(Policy(model), nll, rows_of(trees, row_tokens, 64), torch.device("cpu"), keep=31)
    expected = {}
    for tree in trees:
        out = []
        for branch in range(len(tree.tips)):
            path = tree.path(branch)
            with torch.no_grad():
                logps = model.eval()(torch.from_numpy(tree.ids[path]).long()[None]).logits[0].log_softmax(-1)
            place = {int(i): k for k, i in enumerate(path)}
            mine = tree.tgt[tree.branch == branch]
            out += [-float(logps[place[int(i)] - 1, tree.ids[i]]) for i in mine]
        expected[tree.origin] = out
    assert [e.loss for e in found.worst] == sorted((e.loss for e in found.worst), reverse=True)
    assert {e.tree.origin for e in found.worst} == set(expected)
    for example in found.worst:
        assert example.tokens == pytest.approx(expected[example.tree.origin], rel=1e-4)
        assert example.loss == pytest.approx(np.mean(expected[example.tree.origin]), rel=1e-4)
    few = measure(Policy(model), nll, rows_of(trees, row_tokens, 64), torch.device("cpu"), keep=3)
    assert [e.tree.origin for e in few.worst] == [e.tree.origin for e in found.worst[:3]]


def test_losses_of_whole_examples_and_of_neither() -> None:
    """A value a tree is the tree's; the tokens' are still those of the policy. Other shapes have no worst examples."""
    trees = chains(5, 6)

    def of_trees(logps: torch.Tensor, weights: torch.Tensor) -> Terms:
        return Terms(-logps.view(5, 3).sum(1), torch.ones(5), {"half": torch.full((5,), 0.5)})

    policy, rows = Policy(build("llama")), rows_of(trees, 64, 64)
    found = measure(policy, of_trees, rows, torch.device("cpu"), keep=2)
    assert found.loss == pytest.approx(
        np.mean([e.loss for e in measure(policy, of_trees, rows, torch.device("cpu"), 5).worst])
    )
    assert all(e.loss == pytest.approx(e.tokens.sum(), rel=1e-5) for e in found.worst if e.tokens is not None)
    assert found.extras["half"] / found.weight == 0.5
    of_none = measure(policy, lambda logps, w: Terms(logps[:2], torch.ones(2)), rows, torch.device("cpu"), keep=2)
    assert of_none.worst == []
