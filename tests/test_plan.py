"""Predictions against what really was: sizes, arithmetic, rows and the tokens of a finished run."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

import temper.stages  # noqa: F401  fills the registry
from temper import pipeline, plan, recipe, shapes
from temper.errors import DataError, ModelError
from temper.hub import Source, bytes_to_fetch
from temper.models.methods import Adapter
from temper.pipeline import Choice
from temper.predict import Cost, Predictor
from temper.runfolder import RunFolder, write_json
from temper.stages.pretrain import Pretrain, Shape, fresh


@pytest.fixture
def smoke() -> recipe.Recipe:
    return recipe.load("detox-summarization", profile="smoke", sets=["threads=1"])


def info(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "stage.json").read_text())


def test_sizes_are_those_of_the_models_that_were_made(smoke: recipe.Recipe, smoke_run: Path) -> None:
    size = Predictor(smoke, RunFolder(Path("nowhere"))).size("base")
    assert size is not None and size.parameters == info(smoke_run, "tiny")["parameters"]
    assert size.adapter(Adapter(r=16)) == info(smoke_run, "sft")["trainable_parameters"]
    assert shapes.size_of_source(Source(str(smoke_run / "sft" / "model"))) == size  # the same from a folder


@pytest.mark.parametrize("adapter", [False, True])
def test_arithmetic_against_torch_own_count(adapter: bool) -> None:
    stage = Pretrain(data="x", shape=Shape(vocabulary=900, hidden=64, layers=3, heads=4, context=128))
    size = shapes.size_of_pretrained(stage)
    model = fresh(stage.shape, shapes._Vocabulary(900), seed=0)
    model.set_attn_implementation("eager")  # whose products torch can count
    model.requires_grad_(not adapter)
    embedded = torch.randn(2, 128, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, labels=torch.zeros(2, 128, dtype=torch.long)).loss.backward()
    counted = counter.get_total_flops() / 256
    ours = shapes.training_flops(
        size, scored=1.0, adapter=adapter, head_trained=not adapter, width=128, recompute=False
    )
    assert ours == pytest.approx(counted, rel=0.02)


def test_rows_are_predicted_from_a_look_at_the_source(smoke: recipe.Recipe, smoke_run: Path) -> None:
    fresh_start = Predictor(smoke, RunFolder(Path("nowhere"))).rows("news")
    card = json.loads((smoke_run / "news" / "card.json").read_text())
    assert fresh_start is not None and fresh_start.splits == pytest.approx(card["splits"], rel=0.05)
    known = Predictor(smoke, RunFolder(smoke_run))
    known.known["news"] = RunFolder(smoke_run).peek("news")  # type: ignore[assignment]
    rows = known.rows("news")
    assert rows is not None and rows.splits == card["splits"]
    lengths = card["lengths"]["train"]
    assert lengths["prompt"]["unit"] == "tokens"
    assert rows.tokens == lengths["prompt"]["median"] + lengths["completion"]["median"]


def test_tokens_and_disk_are_near_what_they_were(smoke: recipe.Recipe, smoke_run: Path, tmp_path: Path) -> None:
    steps = plan.make(smoke, tmp_path / "new", Choice())
    assert {step.kind for step in steps} == {"data", "pretrain", "sft", "classifier", "generate", "rl", "evaluate"}
    for step in steps:
        true, told = info(smoke_run, step.name), step.kind in {"data", "pretrain", "sft", "evaluate"}
        if true["tokens"] and (told or step.cost.tokens is not None):
            assert true["tokens"] / 2 < (step.cost.tokens or 0) < true["tokens"] * 2, step.name
        if told:
            assert step.cost.seconds is not None and step.cost.memory_bytes, step.name
        assert step.cost.download_bytes == 0


def test_an_earlier_result_tells_more_than_shapes(smoke: recipe.Recipe, smoke_run: Path) -> None:
    for name in ("tiny", "sft"):
        cost, true = Predictor(smoke, RunFolder(smoke_run)).cost(name), info(smoke_run, name)
        assert cost.tokens == pytest.approx(true["tokens"]) and cost.seconds == pytest.approx(true["seconds"])
    cost, true = Predictor(smoke, RunFolder(smoke_run)).cost("compare"), info(smoke_run, "compare")
    assert cost.seconds == pytest.approx(true["seconds"], rel=0.01)


def test_a_data_set_of_the_hub_is_assumed_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("temper.predict.bytes_to_fetch", lambda *_: None)
    loaded = recipe.load("detox-summarization")
    cost = Predictor(loaded, RunFolder(Path("nowhere"))).cost("news")
    assert cost.download_bytes is None and "assumed" in cost.basis
    assert bytes_to_fetch("not an id", None, "model") is None


def own_recipe(folder: Path, model: Path, **data: object) -> recipe.Recipe:
    """Fine-tuning of a local model on a file of two columns."""
    rows = [{"question": f"Скільки буде {n} та {n}?", "answer": f"Разом {2 * n}."} for n in range(40)]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    qa = {"stage": "data", "source": "qa.jsonl", "prompt": "{question}", "completion": "{answer}", **data}
    file = folder / "own.yaml"
    sft = {"stage": "sft", "data": "qa", "max_steps": 1}
    file.write_text(json.dumps({"name": "own", "model": str(model), "stages": {"qa": qa, "sft": sft}}))
    return recipe.load(file)


def test_tokens_are_counted_where_the_tokenizer_is_local(tiny_model: Path, tmp_path: Path) -> None:
    loaded = own_recipe(tmp_path, tiny_model, drop={"duplicates": "off"})
    rows = Predictor(loaded, RunFolder(tmp_path / "none")).rows("qa")
    assert rows is not None and "counted" in rows.basis
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    lines = [json.loads(line) for line in (tmp_path / "qa.jsonl").read_text(encoding="utf-8").splitlines()]

    def median(column: str) -> float:
        return statistics.median(len(tokenizer.encode(r[column], add_special_tokens=False)) for r in lines)

    assert rows.answer == median("answer")
    assert abs(rows.tokens - median("question") - median("answer")) <= 1  # of both together: their seam may merge
    away = own_recipe(tmp_path, tmp_path / "no-model")
    assumed = Predictor(away, RunFolder(tmp_path / "none")).rows("qa")
    assert assumed is not None and "assumed" in assumed.basis


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"completion": "{anwser}"}, "did you mean «answer»?"),
        ({"keep": ["qestion"]}, "did you mean «question»?"),
    ],
)
def test_a_misspelt_column_is_told_by_plan_as_by_run(
    data: dict[str, object], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = own_recipe(tmp_path, tiny_model, **data)
    steps = {s.name: s for s in plan.make(loaded, tmp_path / "run", Choice())}
    assert steps["qa"].problem and said in steps["qa"].reason
    assert steps["sft"].cost.seconds is None
    with pytest.raises(DataError) as stopped:
        pipeline.run(loaded, tmp_path / "run", quiet=True)
    assert steps["qa"].reason.startswith(stopped.value.what)


def test_totals_are_unknown_where_a_part_is() -> None:
    def step(state: str, **cost: float) -> plan.Step:
        return plan.Step("a", "sft", state, "", Cost(**cost))

    known = step("runs", seconds=2.0, memory_bytes=5.0, download_bytes=0.0, disk_bytes=1.0)
    more = dataclasses.replace(known, cost=Cost(seconds=3.0, memory_bytes=4.0, download_bytes=None, disk_bytes=1.0))
    total = plan.total([known, more, step("cached")])
    assert (total.seconds, total.memory_bytes, total.download_bytes, total.disk_bytes) == (5.0, 5.0, None, 2.0)


SAMPLED = """\
name: r
model: ./somewhere
threads: 1
stages:
  qa: {stage: data, source: "mini:uk-news", prompt: "{text}", completion: "{summary}", take: 60, validation: 10, test: 10}
  new: {stage: generate, data: qa, model: base, instruction: "{prompt}", into: completion, WHICH}
  tuned: {stage: sft, data: new}
  grpo: {stage: rl, data: qa, reward: [rouge], completions: 4, batch_size: 5, max_steps: 6, decoding: {max_new_tokens: 8, temperature: 1.0}}
"""


def sampled(folder: Path, which: str = "take: 7", sets: Sequence[str] = ()) -> recipe.Recipe:
    file = folder / "r.yaml"
    file.write_text(SAMPLED.replace("WHICH", which))
    return recipe.load(file, sets=list(sets))


@pytest.mark.parametrize(
    ("which", "splits"),
    [
        ("take: 7", {"train": 7.0, "validation": 7.0, "test": 7.0}),
        ("splits: [train]", {"train": 40.0}),
        ("grow: 90, example: '{prompt}', instruction: '{examples}'", {"train": 90.0}),
    ],
)
def test_rows_that_a_teacher_will_write(tmp_path: Path, which: str, splits: dict[str, float]) -> None:
    text = SAMPLED.replace('instruction: "{prompt}", ', "") if "grow" in which else SAMPLED
    file = tmp_path / "r.yaml"
    file.write_text(text.replace("WHICH", which))
    rows = Predictor(recipe.load(file), RunFolder(Path("nowhere"))).rows("new")
    assert rows is not None and rows.splits == splits


def test_what_samples_is_predicted_from_itself_alone(tmp_path: Path) -> None:
    """Before it ran nothing is said; afterwards by how much it samples: steps, prompts, completions and their length."""
    nothing = Predictor(sampled(tmp_path), RunFolder(tmp_path / "run")).cost("grpo")
    assert nothing.seconds is None and nothing.tokens is None and "ran once" in nothing.basis
    config = sampled(tmp_path).stages["grpo"].model_dump(mode="json")
    ran = {"schema": 1, "name": "grpo", "kind": "rl", "config": config, "seconds": 10.0, "tokens": 1000, "steps": 6,
           "examples": 40, "peak_memory_bytes": 5, "bytes_on_disk": 7, "parameters": 1}  # fmt: skip
    for name, seconds in (("another", 99.0), ("grpo", 10.0)):  # of one kind; the first name says nothing of the second
        (tmp_path / "run" / name).mkdir(parents=True)
        write_json(tmp_path / "run" / name / "stage.json", ran | {"name": name, "seconds": seconds})
    for sets, factor in [
        ([], 1),
        (["grpo.max_steps=12"], 2),
        (["grpo.completions=8", "grpo.batch_size=10"], 4),
        (["grpo.max_steps=null", "grpo.epochs=3"], 40 * 3 / 5 / 6),
        (["grpo.decoding.max_new_tokens=16"], 2),
    ]:
        cost = Predictor(sampled(tmp_path, sets=sets), RunFolder(tmp_path / "run")).cost("grpo")
        assert cost.seconds == pytest.approx(10 * factor) and cost.tokens == pytest.approx(1000 * factor)
    other = Predictor(sampled(tmp_path, sets=["grpo.model=./larger"]), RunFolder(tmp_path / "run")).cost("grpo")
    assert other.seconds is None


def test_answers_to_one_prompt_are_counted(smoke: recipe.Recipe, smoke_run: Path) -> None:
    """Four answers to each prompt take about four times as long to decode."""
    stage = smoke.stages["compare"]
    once, four = (
        Predictor(dataclasses.replace(smoke, stages=smoke.stages | {"compare": stage.model_copy(update={"samples": k})}),
                  RunFolder(smoke_run)).cost("compare") for k in (1, 4)
    )  # fmt: skip
    assert once.seconds and four.seconds == pytest.approx(4 * once.seconds)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": ["q_prj"]}, "did you mean «q_proj»?"),
        ({"method": "prompt", "tokens": 100_000}, "leave no room in a context of"),
    ],
)
def test_an_adapter_that_the_model_cannot_take_is_told_by_plan_as_by_run(
    adapter: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = own_recipe(tmp_path, tiny_model)
    loaded.stages["sft"] = loaded.stages["sft"].model_copy(update={"adapter": Adapter(**adapter)})
    steps = {s.name: s for s in plan.make(loaded, tmp_path / "run", Choice())}
    assert not steps["qa"].problem and steps["sft"].problem and said in steps["sft"].reason
    with pytest.raises(ModelError) as stopped:
        pipeline.run(loaded, tmp_path / "run", quiet=True)
    assert steps["sft"].reason.startswith(stopped.value.what)
