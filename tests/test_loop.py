"""The loop against PyTorch by hand: one step, the schedules, the order of examples, and what it refuses to go on with."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import temper.stages  # noqa: F401  (registers them)
from temper import recipe as recipes
from temper.engine import checkpoint, optim, tripwires
from temper.engine.batches import Batches
from temper.engine.lines import append, forget_after
from temper.engine.loop import Loop
from temper.errors import TrainingError
from temper.job import Job, Log
from temper.losses import Terms, nll
from temper.models import adapters
from temper.models.scores import Policy
from temper.trees import Tree, chain, group, rows_of
from tiny_models import VOCABULARY, build

RECIPE = """
name: loop
model: nowhere
stages:
  data: {{stage: data, source: rows.jsonl, text: "{{text}}"}}
  sft: {{stage: sft, model: nowhere, data: data, {fields}}}
"""

Made = Callable[..., Loop]


def examples(n: int = 10, seed: int = 0) -> list[Tree]:
    """Chains of 4 to 20 tokens, part of them trained."""
    draw = np.random.default_rng(seed)
    out = []
    for k in range(n):
        length = int(draw.integers(4, 21))
        prompt = int(draw.integers(1, length - 2))
        ids = draw.integers(3, VOCABULARY, length).tolist()
        out.append(chain(ids, [0.0] * prompt + [1.0] * (length - prompt), f"rows.jsonl:{k + 1}"))
    return out


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A loop with a real job: its stage comes from a recipe file."""
    number = 0

    def make(
        fields: dict[str, Any] | None = None,
        *,
        model: Any = None,
        trees: Sequence[Tree] | None = None,
        validation: Sequence[Tree] = (),
        folder: Path | None = None,
        loss: Any = nll,
    ) -> Loop:
        nonlocal number
        number += 1
        given = {"schedule": "constant", "warmup": 0, "precision": "float32", **(fields or {})}
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.format(fields=", ".join(f"{k}: {json.dumps(v)}" for k, v in given.items())))
        recipe = recipes.load(file)
        folder = folder or tmp_path / f"sft{number}.partial"
        folder.mkdir(exist_ok=True)
        job = Job(recipe, "sft", folder, {}, Log(tmp_path / "log", quiet=True))
        job.start_clock()
        stage: Any = job.stage
        batches = Batches(
            trees if trees is not None else examples(),
            stage.batch_size * stage.accumulation,
            stage.row_tokens,
            stage.micro_tokens,
            job.seed,
        )
        held = rows_of(validation, stage.row_tokens, stage.micro_tokens) if validation else []
        return Loop(job, Policy(model or build("llama")), loss, batches, stage, stage.precision, held)

    return make


def lines(loop: Loop) -> list[dict[str, Any]]:
    return [json.loads(line) for line in loop.metrics.read_text(encoding="utf-8").splitlines()]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


def labels_loss(model: Any, trees: Sequence[Tree]) -> torch.Tensor:
    """transformers' own loss of one padded batch; weights 0 and 1 only."""
    width = max(map(len, trees))
    ids, labels = torch.zeros(len(trees), width, dtype=torch.long), torch.full((len(trees), width), -100)
    mask = torch.zeros_like(ids)
    for k, tree in enumerate(trees):
        ids[k, : len(tree)] = torch.from_numpy(tree.ids)
        mask[k, : len(tree)] = 1
        labels[k, tree.tgt] = torch.from_numpy(tree.ids[tree.tgt]).long()
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


# A step


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_loss_and_gradients_do_not_depend_on_the_cut(made: Made, family: str) -> None:
    trees, model = examples(12), build(family)
    theirs = labels_loss(model, trees)
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    scale = torch.stack([g.norm() for g in expected]).norm()
    cuts = [(1024, 4096), (16, 16), (32, 64), (50, 300), (16, 4096)]
    micro_batches = set()
    for row_tokens, micro_tokens in cuts:
        loop = made(
            {"row_tokens": row_tokens, "micro_tokens": micro_tokens, "batch_size": 12}, model=model, trees=trees
        )
        rows = loop.batches.rows(0)
        micro_batches.add(len(rows))
        loss, _ = loop.gradients(rows)
        assert loss == pytest.approx(theirs.item(), rel=2e-6)
        error = torch.stack([(p.grad - g).norm() for p, g in zip(model.parameters(), expected, strict=True)]).norm()  # type: ignore[operator]
        assert error / scale < 1e-5
        model.zero_grad(set_to_none=True)
    assert 1 in micro_batches and max(micro_batches) >= 6


def test_weights_count_once_over_all_micro_batches(made: Made) -> None:
    """Σ w·(−log p) / Σ w over the whole step, not a mean of micro-batches' means; branches count too."""
    trees = [chain([5, 6, 7], [0, 1, 1]), chain([9] * 12, [0.0, *[0.25] * 11]), group([3, 4], [[8, 9, 10], [11]])]
    loop = made({"row_tokens": 16, "micro_tokens": 16}, trees=trees)
    rows = loop.batches.rows(0)
    assert len(rows) >= 2
    with torch.no_grad():
        values = [(loop.policy(r), r.weight) for r in rows]
    total = sum(float((-v.double() * w.double()).sum()) for v, w in values)
    weight = sum(float(w.double().sum()) for _, w in values)
    assert weight == pytest.approx(2 + 11 * 0.25 + 4)
    assert loop.gradients(rows)[0] == pytest.approx(total / weight, rel=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_one_step_is_adamw_by_hand(made: Made, clip: float) -> None:
    model = build("llama")
    lr, decay = 3e-3, 0.1
    loop = made(
        {"lr": lr, "weight_decay": decay, "clip": clip, "max_steps": 1, "batch_size": 10, "row_tokens": 32},
        model=model,
    )
    before = weights(model)
    names = list(before)
    found = torch.autograd.grad(labels_loss(model, loop.batches.trees), list(model.parameters()))
    slope = {n: g.double() for n, g in zip(names, found, strict=True)}
    norm = math.sqrt(sum(float((g**2).sum()) for g in slope.values()))
    assert norm > 0.05
    loop.run()
    for name, parameter in model.named_parameters():
        g = slope[name] * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        p = before[name].double()
        if p.ndim >= 2:
            p = p * (1 - lr * decay)
        moved = p - lr * g / (g.abs() + 1e-8)  # both moments, corrected for their start, are the gradient's
        small = g.abs() < 1e-5  # there the direction is rounding
        assert torch.allclose(parameter.double()[~small], moved[~small], rtol=0, atol=2e-6), name
    assert lines(loop)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_several_steps_are_torch_adamw(made: Made) -> None:
    """Five steps against the optimiser, clipping and schedule of PyTorch on padded batches."""
    model = build("qwen3")
    twin = copy.deepcopy(model)
    loop = made(
        {"lr": 1e-3, "schedule": "linear", "warmup": 2, "max_steps": 5, "batch_size": 2, "accumulation": 2,
         "weight_decay": 0.1, "clip": 1.0, "row_tokens": 16, "micro_tokens": 16}, model=model,
    )  # fmt: skip
    loop.run()
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    for step, rate in enumerate([1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3 / 3, 1e-3 / 3]):
        for g in adam.param_groups:
            g["lr"] = rate
        trees = [loop.batches.trees[i] for i in loop.batches.chosen(step)]
        labels_loss(twin, trees).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    assert [line["lr"] for line in lines(loop)] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_by_hand(name: str) -> None:
    schedule = optim.schedules.get(name)
    rates = [schedule(step, 12, 3) for step in range(12)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
    ninths = [k / 9 for k in range(9)]
    expected = {
        "cosine": [0.5 * (1 + math.cos(math.pi * x)) for x in ninths],
        "linear": [1 - x for x in ninths],
        "constant": [1.0] * 9,
    }[name]
    assert rates[3:] == pytest.approx(expected)
    assert all(0 < r <= 1 for r in rates), "no step is taken at a rate of nothing"


def test_groups_decay_matrices_alone() -> None:
    found = optim.groups(build("gpt2").named_parameters(), 1e-3, 0.1)
    assert [g["weight_decay"] for g in found] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in found[0]["params"]) and all(p.ndim == 1 for p in found[1]["params"])
    assert sum(len(g["params"]) for g in found) == len(list(build("gpt2").parameters()))


# Batches


@pytest.mark.parametrize(("n", "size"), [(10, 3), (12, 4), (3, 8), (1, 1)])
def test_every_example_once_an_epoch(n: int, size: int) -> None:
    trees = examples(n)
    batches = Batches(trees, size, 64, 256, seed=4)
    assert batches.per_epoch == math.ceil(n / size)
    epochs = []
    for epoch in range(3):
        steps = [batches.chosen(epoch * batches.per_epoch + k) for k in range(batches.per_epoch)]
        assert sorted(i for step in steps for i in step) == list(range(n))
        assert [len(s) for s in steps] == [size] * (n // size) + ([n % size] if n % size else [])
        epochs.append(steps)
    if n > 3:
        assert epochs[0] != epochs[1] != epochs[2], "another order every epoch"
    again = Batches(trees, size, 16, 16, seed=4)
    assert [again.chosen(k) for k in range(6)] == [batches.chosen(k) for k in range(6)]
    if n > 3:
        assert [Batches(trees, size, 64, 256, seed=5).chosen(k) for k in range(6)] != [
            batches.chosen(k) for k in range(6)
        ]
    held = [t for row in batches.rows(0) for t in row.trees]
    assert sorted(map(id, held)) == sorted(id(trees[i]) for i in batches.chosen(0))


def test_epochs_and_steps(made: Made) -> None:
    assert made({"epochs": 2.5, "batch_size": 4}).steps == 8  # 10 examples: 3 steps an epoch
    assert made({"epochs": 2.5, "batch_size": 4, "max_steps": 5}).steps == 5
    assert made({"epochs": 0.01}).steps == 1
    assert made({"max_steps": 40, "warmup": 0.1}).warmup == 4


# Validation


def test_validation_loss_is_the_mean_over_tokens(made: Made) -> None:
    """Dropout is off, and rows of unequal length weigh by their tokens."""
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    held = examples(7, seed=9)
    loop = made({"row_tokens": 32, "micro_tokens": 64}, model=model, validation=held)
    assert len(loop.plan.rows) > 1
    model.train()
    got = loop.validation_loss()
    model.eval()
    with torch.no_grad():
        assert got == pytest.approx(labels_loss(model, held).item(), rel=2e-6)


def overfit(made: Made, fields: dict[str, Any], **more: Any) -> Loop:
    """Memorising four sequences makes the likelihood of others fall."""
    held = examples(4, seed=1)
    settings = {"lr": 2e-2, "batch_size": 4, "evaluate_every": 1, **fields}
    return made(settings, trees=examples(4), validation=held, **more)


def test_early_stopping_ends_with_the_best_weights(made: Made) -> None:
    loop = overfit(made, {"max_steps": 40, "patience": 3})
    loop.run()
    validations = {line["step"]: line["validation_loss"] for line in lines(loop) if "validation_loss" in line}
    best = min(validations, key=lambda s: validations[s])
    assert loop.state["step"] == best + 3 < 40 and loop.state["best"] == validations[best]
    assert [line["best"] for line in lines(loop) if "validation_loss" in line][-4:] == [True, False, False, False]
    assert loop.validation_loss() == validations[best]
    stopped_there = overfit(made, {"max_steps": best, "keep_best": False})
    stopped_there.run()
    assert equal(weights(loop.policy), weights(stopped_there.policy))
    assert any("stopped early" in text for text in loop.job.warnings)


def test_without_keep_best_the_last_weights_stay(made: Made) -> None:
    loop = overfit(made, {"max_steps": 6, "keep_best": False})
    loop.run()
    last = [line["validation_loss"] for line in lines(loop) if "validation_loss" in line]
    assert loop.validation_loss() == last[-1] > min(last)
    assert not checkpoint.bests(loop.root)


# What it refuses


def poisoned(token: int) -> Any:
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return model


def test_a_loss_that_is_no_number_names_its_rows(made: Made) -> None:
    trees = [chain([4, 5, 6], [0, 1, 1], f"rows.jsonl:{k}") for k in range(4)]
    trees.append(chain([4, 90, 6], [0, 1, 1], "rows.jsonl:bad"))
    loop = made({"batch_size": 1, "checkpoint_every": 1, "epochs": 2}, model=poisoned(90), trees=trees)
    bad = next(k for k in range(5) if loop.batches.chosen(k) == [4])
    assert bad > 0, "the seed puts good steps before the bad one"
    with pytest.raises(TrainingError, match=f"loss of step {bad + 1} is nan") as error:
        loop.run()
    assert "rows.jsonl:bad" in error.value.where and "rows.jsonl:0" not in error.value.where
    kept = checkpoint.latest(loop.root, pytest.fail)
    assert kept is not None and kept[1]["step"] == bad
    assert all(torch.isfinite(p[:90]).all() for p in loop.policy.parameters()), "the step was not taken"


def test_a_gradient_of_nothing_stops_the_run(made: Made) -> None:
    """A LoRA whose B stays zero and is not trained: its A has no influence."""
    model = adapters.attach(build("llama"), adapters.Adapter(r=2), seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_A" in name
    with pytest.raises(TrainingError, match="exactly zero"):
        made(model=model).run()


def test_a_gradient_that_overflows_stops_the_run(made: Made) -> None:
    def steep(logps: torch.Tensor, w: torch.Tensor) -> Terms:
        return Terms(torch.sqrt(logps.detach() - logps), w)  # 0, with an infinite slope

    with pytest.raises(TrainingError, match="gradient norm of step 1 is"):
        made(loss=steep).run()


def test_warnings_on_plans_that_are_likely_mistakes(made: Made) -> None:
    plan = {"steps": 1, "steps_per_epoch": 5, "warmup": 0}
    assert "before the first epoch" in tripwires.before(**plan, asked=False)[0]
    assert made({"max_steps": 1, "batch_size": 2}).warnings() == [], "max_steps is the recipe's own choice"
    assert "warm-up takes 9 steps and the run has 5" in made({"max_steps": 5, "warmup": 9}).warnings()[0]
    assert made({"epochs": 1, "batch_size": 2}).warnings() == []
    never = tripwires.after(schedule="cosine", rates=[1e-3] * 3, took=9, planned=9)
    assert "never moved" in never[0]
    assert tripwires.after(schedule="constant", rates=[1e-3] * 3, took=9, planned=9) == []
    assert tripwires.after(schedule="cosine", rates=[1e-3, 9e-4, 5e-4], took=9, planned=9) == []


def test_warnings_on_early_ends_and_on_what_can_do_nothing(made: Made) -> None:
    plan: dict[str, Any] = {"schedule": "cosine", "rates": [1e-4, 2e-4, 5e-4], "took": 3, "planned": 20}
    (text,) = tripwires.after(**plan, warmup=5, steps_per_epoch=10, peak=1e-3)
    assert (
        "after 3 of 20 steps" in text and "middle of the warm-up (5 steps)" in text and "first epoch (10 steps)" in text
    )
    (text,) = tripwires.after(**{**plan, "took": 12}, warmup=5, steps_per_epoch=10, peak=1e-3)
    assert "warm-up" not in text and "epoch" not in text
    held = examples(3, seed=5)
    fields = {"max_steps": 6, "patience": 3, "evaluate_every": 2}
    assert (
        "patience acts after 3 validations without improvement, and there will be 3"
        in (made(fields, validation=held).warnings()[0])
    )
    assert made({**fields, "evaluate_every": 1, "validation_budget": 1.0}, validation=held).warnings() == []
    assert "there will be 0" in made({"schedule": "plateau"}).warnings()[0]


def test_a_plateau_lowers_the_rate_and_one_that_never_moved_is_told(made: Made) -> None:
    """Memorising four sequences: validation gets worse at once, and the rate falls after each validation but the best."""
    fields = {"max_steps": 8, "lr": 2e-2, "evaluate_every": 2, "warmup": 1, "schedule": {"plateau": {"patience": 0}}}
    loop = overfit(made, fields)
    loop.run()
    found, best, rate, expected = lines(loop), math.inf, 1.0, []
    for line in found:
        if "lr" in line:
            expected.append(2e-2 * rate * (0.5 if line["step"] == 1 else 1.0))
        elif line["validation_loss"] < best * (1 - 1e-4):
            best = line["validation_loss"]
        else:
            rate /= 2
    assert [line["lr"] for line in found if "lr" in line] == pytest.approx(expected) and rate < 0.5
    assert loop.job.warnings == []
    still = overfit(made, {**fields, "schedule": {"plateau": {"patience": 3}}})
    still.run()
    assert any("«plateau» never moved the learning rate from 0.02 after warm-up" in w for w in still.job.warnings)


def test_the_noise_of_the_gradients_norm(made: Made) -> None:
    """Up to twenty steps the plain mean and variance of the norms, then weights that fall by 19/20 a step."""
    loop = made({"max_steps": 26, "batch_size": 2})
    loop.run()
    norms = np.array([line["grad_norm"] for line in lines(loop)])
    for n in (2, 7, 20, 26):
        first = np.full(min(n, 20), 1 / min(n, 20)) * 0.95 ** max(0, n - 20)
        weight = np.concatenate([first, 0.05 * 0.95 ** np.arange(n - 20)[::-1]]) if n > 20 else first
        mean = (weight * norms[:n]).sum()
        spread = ((weight * (norms[:n] - mean) ** 2).sum()) ** 0.5
        assert lines(loop)[n - 1]["grad_noise"] == pytest.approx(spread / mean, rel=1e-9)


def test_activation_checkpointing_recomputes(made: Made) -> None:
    """Said to be on, it is: in a step each block runs twice, with the same gradients."""
    passes, gradients = [], []
    for on in (False, True):
        model, calls = build("llama"), [0]
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # before, not after: the second pass ends as soon as all that the backward pass needs is there
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.__setitem__(0, c[0] + 1))
        loop = made(model=model)
        loop.gradients(loop.batches.rows(0))
        passes.append(calls[0])
        gradients.append([p.grad for p in model.parameters()])
    assert passes[1] == 2 * passes[0] > 0
    for a, b in zip(*gradients, strict=True):  # by other sums in places: see `remade`
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32(made: Made, precision: str) -> None:
    fields = {"max_steps": 12, "lr": 1e-3, "batch_size": 5}
    exact, half = made(fields), made({**fields, "precision": precision})
    exact.run()
    half.run()
    a, b = ([line["loss"] for line in lines(loop)] for loop in (exact, half))
    assert a != b, "it really computes in another precision"
    assert b == pytest.approx(a, rel=0.05) and b[-1] < b[0]
    assert all(p.dtype == torch.float32 for p in half.policy.parameters())


def test_fp16_survives_an_overflow(made: Made) -> None:
    """Loss scaling begins too high for this loss: the first steps are skipped, the scale falls, training goes on."""

    def large(logps: torch.Tensor, w: torch.Tensor) -> Terms:
        terms = nll(logps, w)
        return Terms(terms.values * 100, w)

    loop = made({"max_steps": 12, "precision": "fp16", "batch_size": 10}, loss=large)
    before = weights(loop.policy)
    start = loop.scaler.get_scale()
    loop.run()
    assert loop.scaler.get_scale() < start
    norms = [line["grad_norm"] for line in lines(loop)]
    assert norms[0] is None and norms[-1] is not None
    assert not equal(before, weights(loop.policy))
    assert all(torch.isfinite(p).all() for p in loop.policy.parameters())


# What it writes


def test_metrics_are_json_lines_of_the_documented_shape(made: Made) -> None:
    loop = made({"max_steps": 4, "evaluate_every": 2, "batch_size": 4}, validation=examples(2, seed=3))
    loop.run()
    raw = loop.metrics.read_text(encoding="utf-8")
    assert raw.endswith("\n")
    found = [json.loads(line, parse_constant=pytest.fail) for line in raw.splitlines()]
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    machine = {"tokens_per_second", "seconds", "cpu_percent", "memory_gb"}
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens", *machine}
    assert all(set(line) == {*steps[0], "grad_noise"} for line in steps[1:]), "one step alone tells of no noise"
    assert all(line["memory_gb"] > 0 for line in steps) and steps[-1]["cpu_percent"] > 0
    tokens = np.cumsum([sum(len(loop.batches.trees[i]) for i in loop.batches.chosen(k)) for k in range(4)])
    assert [line["tokens"] for line in steps] == tokens.tolist()
    validations = [line for line in found if "validation_loss" in line]
    assert [set(line) for line in validations] == [{"step", "validation_loss", "best"}] * 2
    counts = loop.job.counts
    assert (counts["steps"], counts["tokens"]) == (4, tokens[-1])
    scored = [len(loop.batches.trees[i].tgt) for k in range(4) for i in loop.batches.chosen(k)]
    assert counts["trained_tokens"] == sum(scored)


def test_extra_columns_reach_the_loss_and_extras_the_log(made: Made) -> None:
    """Columns stay with their tokens through packing; extras are logged as the step's weighted mean, however it was cut."""
    rng = np.random.default_rng(0)
    trees = [
        dataclasses.replace(t, weight=rng.uniform(0.5, 2, len(t.tgt)).astype(np.float32),
                            extra={"mark": t.ids[t.tgt].astype(np.float32)})
        for t in examples(6)
    ]  # fmt: skip

    def loss(logps: torch.Tensor, w: torch.Tensor, mark: torch.Tensor) -> Terms:
        return Terms(-logps * mark, w, {"mark": mark})

    found = []
    for micro in (64, 1024):
        loop = made({"max_steps": 1, "batch_size": 6, "row_tokens": 64, "micro_tokens": micro}, trees=trees, loss=loss)
        for row in loop.batches.rows(0):
            assert torch.equal(row.extra["mark"], row.ids[row.tgt].float())
        loop.run()
        found.append(lines(loop)[0]["mark"])
    ids, weight = (np.concatenate(p) for p in zip(*((t.ids[t.tgt], t.weight) for t in trees), strict=True))
    assert found == pytest.approx([float((ids * weight).sum() / weight.sum())] * 2, rel=1e-6)


def test_lines_of_later_steps_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        append(file, {"step": step, "loss": 0.5})
    with open(file, "a", encoding="utf-8") as out:
        out.write('{"step": 5, "lo')  # what a kill leaves
    forget_after(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] == [1, 2, 3]


class Killed(BaseException):
    pass


PLATEAU = {"schedule": {"plateau": {"patience": 0, "threshold": 0.5}}, "evaluate_every": 2}


@pytest.mark.parametrize("fields", [{}, {"optimizer": "sgd"}, {"precision": "fp16"}, PLATEAU])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(made: Made, tmp_path: Path, fields: dict[str, Any]) -> None:
    """With dropout, an epoch's end in between and a best checkpoint; the loop is a new one, the weights are fresh."""

    def model() -> Any:
        found = build("gpt2")
        for module in found.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return found

    fields = {"max_steps": 9, "batch_size": 3, "schedule": "cosine", "checkpoint_every": 2, "evaluate_every": 3, "lr": 1e-3,
              **fields}  # fmt: skip
    held = examples(3, seed=5)
    whole = made(fields, model=model(), validation=held)
    whole.run()
    passes = 0

    def until_killed(logps: torch.Tensor, w: torch.Tensor) -> Terms:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == 6:
            raise Killed
        return nll(logps, w)

    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        made(fields, model=model(), validation=held, folder=folder, loss=until_killed).run()
    resumed = made(fields, model=model(), validation=held, folder=folder)
    resumed.run()
    assert equal(weights(whole.policy), weights(resumed.policy))
    kept = ("step", "loss", "lr", "grad_norm", "grad_noise", "tokens", "validation_loss", "best")
    assert [{k: v for k, v in line.items() if k in kept} for line in lines(resumed)] == [
        {k: v for k, v in line.items() if k in kept} for line in lines(whole)
    ]


# The same bytes

TWICE = """
import hashlib, json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import temper.stages  # noqa: F401  (registers them)
from temper import recipe as recipes
from temper.engine import device
from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.job import Job, Log
from temper.losses import nll
from temper.models.scores import Policy
from temper.stages.pretrain import Shape, blocks, fresh, train_tokenizer
from temper.trees import rows_of
from temper.types import Record

folder = Path(sys.argv[1])
device.setup("cpu", 1)
words = "дерево море хмара гора ріка tree sea cloud hill river".split()
texts = [" ".join(words[(i * k + k) % 10] for k in range(1, 5 + i % 9)) + "." for i in range(60)]
shape = Shape(vocabulary=320, hidden=32, layers=2, heads=4, context=32)
tokenizer = train_tokenizer(texts, shape)
tokenizer.save_pretrained(folder)
trees = [t for k, x in enumerate(texts) for t in blocks(tokenizer, Record({{"text": x}}, str(k)), 32)]
job = Job(recipes.load(sys.argv[2]), "sft", folder, {{}}, Log(None, quiet=True))
job.start_clock()
policy = Policy(fresh(shape, tokenizer, 1))
batches = Batches(trees, 8, 64, 128, 1)
Loop(job, policy, nll, batches, job.stage, job.stage.precision, rows_of(trees[:5], 64, 128)).run()
digest = hashlib.sha256()
for name, tensor in sorted(policy.state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
print(json.dumps([hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(), digest.hexdigest()]))
"""


def test_the_same_training_in_two_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(fields="max_steps: 12, lr: 1e-3, precision: bf16, evaluate_every: 4"))
    script = TWICE.format(tests=str(Path(__file__).parent))
    started = []
    for k in (1, 2):
        folder = tmp_path / str(k)
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONHASHSEED": str(k)}
        command = [sys.executable, "-W", "ignore", "-c", script, str(folder), str(file)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    found = [p.communicate(timeout=240)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0]
    first, second = (json.loads(text.splitlines()[-1]) for text in found)
    assert first == second
