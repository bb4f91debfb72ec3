"""A T5 through every stage: made, taught with adapters of every method, aligned, asked and compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import temper.app
from staged_runs import lines_of
from temper.data.card import read_rows
from temper.errors import RecipeError
from temper.hub import Source
from temper.models import adapted, adapters
from temper.pipeline import Choice
from temper.runfolder import read_json
from temper.stages.denoise import Texts
from test_methods import METHODS

QUICK = {"batch_size": 8, "max_steps": 4, "lr": 3e-3, "precision": "float32"}
LORA = {"method": "lora", "r": 4, "targets": ["q", "v"]}
RECIPE: dict[str, Any] = {
    "name": "lines", "model": "tiny", "seed": 3, "threads": 1,
    "stages": {
        "corpus": {"stage": "data", "source": "mini:en-advice-corpus", "text": "{text}", "take": 200, "validation": 10, "test": 0},
        "tiny": {"stage": "pretrain", "data": "corpus", **QUICK, "max_steps": 12,
                 "shape": {"family": "t5", "vocabulary": 700, "hidden": 32, "layers": 1, "heads": 2, "context": 96}},
        "asked": {"stage": "data", "source": "mini:en-advice", "split": "train", "prompt": "{prompt}", "completion": "{completion}",
                  "take": 60, "validation": 8, "test": 8},
        "pairs": {"stage": "data", "source": "mini:en-advice", "split": "train", "prompt": "{prompt}", "chosen": "{chosen}",
                  "rejected": "{rejected}", "take": 40, "validation": 8, "test": 0},
        "sft": {"stage": "sft", "model": "base", "data": "asked", "adapter": LORA, "merge": True, **QUICK},
        "both": {"stage": "sft", "model": "base", "data": "asked", "adapter": {**LORA, "method": "lora+prompt", "tokens": 4}, **QUICK},
        "dpo": {"stage": "preference", "model": "sft", "data": "pairs", "adapter": LORA, "merge": True, **QUICK},
        "judge": {"stage": "reward", "model": "base", "data": "pairs", **QUICK},
        "grpo": {"stage": "rl", "model": "sft", "data": "asked", "algorithm": "grpo", "adapter": LORA, "completions": 4, "batch_size": 2,
                 "max_steps": 2, "reward": [{"length": {"target": 5}}], "decoding": {"max_new_tokens": 8, "temperature": 1.0},
                 "lr": 1e-3, "precision": "float32"},
        "more": {"stage": "generate", "data": "asked", "model": "sft", "instruction": "{prompt}", "decoding": {"max_new_tokens": 8}, "take": 8},
        "compare": {"stage": "evaluate", "models": ["base", "sft", "both", "dpo", "grpo"], "data": "asked.test",
                    "metrics": ["rougeL", "loss", "ended", "reward"], "reward_model": "judge", "decoding": {"max_new_tokens": 8}, "resamples": 200},
    },
}  # fmt: skip


def run(folder: Path, *only: str, **stages: dict[str, Any]) -> Path:
    recipe = {
        **RECIPE,
        "stages": {
            name: {**RECIPE["stages"].get(name, {}), **stages.get(name, {})} for name in {**RECIPE["stages"], **stages}
        },
    }
    file = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True, parents=True)
    with open(file, "w", encoding="utf-8") as out:
        YAML().dump(json.loads(json.dumps(recipe)), out)
    temper.app.run_recipe(file, choice=Choice(only=list(only)) if only else None, out=folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("lines"))


def test_every_stage_takes_it(done: Path) -> None:
    results = read_json(done / "report" / "results.json")
    assert set(results["stages"]) == set(RECIPE["stages"])
    scores = results["evaluations"]["compare"]["models"]
    assert all(scores[name]["loss"]["value"] < 8 for name in ("base", "sft", "both", "dpo", "grpo"))
    facts = {name: read_json(done / name / "stage.json")["facts"] for name in ("sft", "dpo", "grpo", "both")}
    assert facts["sft"]["layout"] == "tree" and "equal each alone" in facts["sft"]["proof"]
    assert facts["grpo"]["sampler"].startswith("by generate: an encoder–decoder")
    assert "for the encoder" in facts["dpo"]["written_as"]


def test_learning_from_rewards_samples_what_it_trains(done: Path) -> None:
    lines = lines_of(done / "grpo" / "metrics.jsonl")
    assert next(x["ratio"] for x in lines if "ratio" in x) == pytest.approx(1, abs=1e-5)
    assert all(x["sampling_gap"] < 1e-4 for x in lines if "sampling_gap" in x)


def test_two_adapters_on_disk(done: Path) -> None:
    folder = done / "both" / "adapter"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["lora", "prompt_tuning"]
    hf, _ = adapters.open_model(Source(str(done / "tiny" / "model"), None, (str(folder),)))
    assert [adapted.kind(part).value for part in adapted.parts(hf)] == ["LORA", "PROMPT_TUNING"]
    # by hand: queries and values of three attentions, each 4·(32 + 32), and 4 virtual tokens of width 32
    trained = read_json(done / "report" / "results.json")["stages"]["both"]["trainable_parameters"]
    assert trained == 3 * 2 * 4 * 64 + 4 * 32


def test_what_is_trained_is_the_answer_and_its_end_token(done: Path) -> None:
    """By decoding what the summary shows: the prompt with its end token, then the answer with its own in brackets."""
    log = (done / "pipeline.log").read_text(encoding="utf-8")
    shown = log[log.index("sft:") :]
    assert "<eos>⟦" in shown and "<eos>⟧" in shown


@pytest.mark.parametrize("method", [m for m in METHODS if "+" not in m])
def test_every_method_trains(method: str, done: Path, tmp_path: Path) -> None:
    options = {**METHODS[method], **({"targets": ["q", "v"]} if method in ("lora", "adalora") else {})}
    taught = {
        **RECIPE["stages"]["sft"],
        "adapter": {"method": method, **options},
        "merge": False,
        "max_steps": 12,
        "lr": 0.05,
    }
    copy = tmp_path / "lines"
    shutil.copytree(done, copy / "run")
    stage = run(copy, "one", one=taught) / "one"
    losses = [x["loss"] for x in lines_of(stage / "metrics.jsonl") if "loss" in x]
    assert losses[-1] < losses[0]
    if method == "adalora":
        ranks = read_json(stage / "stage.json")["facts"]["ranks"]
        assert ranks.startswith("2 on average")


def test_limits_of_prompts_and_answers_are_counted(done: Path, tmp_path: Path) -> None:
    """What is cut keeps the prompt's end token, and loses the answer's."""
    copy = tmp_path / "lines"
    shutil.copytree(done, copy / "run")
    stage = run(copy, "sft", sft={"max_prompt": 12, "max_answer": 10, "too_long": "cut"}) / "sft"
    assert "prompts longer than 12 tokens" in (stage.parent / "pipeline.log").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="max_length is no limit of this model"):
        run(copy, "sft", sft={"max_length": 64})


WAYS = {
    "greedy": {"max_new_tokens": 8},
    "search": {"max_new_tokens": 8, "beams": 3},
    "drawn": {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.8},
}


def test_ways_to_decode_are_compared_as_models_are(done: Path, tmp_path: Path) -> None:
    """Each way as alone; every model with the others in the same way, and with itself in another."""
    copy = tmp_path / "lines"
    shutil.copytree(done, copy / "run")
    fields = {
        **RECIPE["stages"]["compare"],
        "models": ["base", "sft"],
        "metrics": ["rougeL", "loss"],
        "reward_model": None,
    }
    several = {k: v for k, v in fields.items() if k != "decoding"} | {"decodings": WAYS}
    alone = [{**fields, "decoding": way} for way in WAYS.values()]
    stages = {"several": several, **{f"only{k}": one for k, one in enumerate(alone)}}
    results = read_json(run(copy, *stages, **stages) / "report" / "results.json")["evaluations"]
    found = results["several"]
    assert list(found["models"]) == [f"{m}, {w}" for w in WAYS for m in ("base", "sft")]
    for k, way in enumerate(WAYS):
        for model in ("base", "sft"):
            assert found["models"][f"{model}, {way}"] == results[f"only{k}"]["models"][model]
    pairs = {(c["a"], c["b"]) for c in found["comparisons"]}
    same = {(f"base, {w}", f"sft, {w}") for w in WAYS}
    assert pairs == same | {(f"{m}, greedy", f"{m}, {w}") for m in ("base", "sft") for w in ("search", "drawn")}
    assert found["decoding"]["search"]["beams"] == 3
    page = (copy / "run" / "report" / "report.md").read_text(encoding="utf-8")
    assert "sft, search" in page
    with pytest.raises(RecipeError, match="both given"):
        run(copy, "several", several={**several, "decoding": {}})


def test_rows_are_written_in_every_way(done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lines"
    shutil.copytree(done, copy / "run")
    fields = {k: v for k, v in RECIPE["stages"]["more"].items() if k != "decoding"}
    fields |= {"reject": {"unfinished": False, "empty": False}, "splits": ["train"], "into": "completion"}
    stage = run(copy, "ways", ways={**fields, "decodings": WAYS, "tries": 1}) / "ways"
    rows = [r.row for r in read_rows(stage / "data" / "train.parquet")]
    assert {r["decoding"] for r in rows} == set(WAYS) and len(rows) == 3 * 8
    alone = run(copy, "one", one={**fields, "decoding": {**WAYS["search"], "temperature": 0}, "tries": 1}) / "one"
    wanted = [r.row["completion"] for r in read_rows(alone / "data" / "train.parquet")]
    assert [r["completion"] for r in rows if r["decoding"] == "search"] == wanted


def test_what_a_t5_is_pretrained_on() -> None:
    """Read and written, put together again, are the text; other spans in the next epoch; or all of it is written."""
    sentinel, ids = list(range(100, 110)), list(range(10, 50))
    texts = Texts([ids], ["a:1"], sentinel, 1, seed=0)
    seen = set()
    for epoch in range(4):
        tree = texts.tree(0, epoch)
        read, written = tree.ids[: tree.root].tolist(), tree.ids[tree.root :].tolist()
        assert read[-1] == written[-1] == 1 and len(tree.tgt) == len(written)
        spans = {}
        for token in written[:-1]:
            if token in sentinel:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert [t for token in read[:-1] for t in spans.get(token, [token])] == ids
        assert sum(map(len, spans.values())) == 6 and spans[next(reversed(spans))] == []
        seen.add(tuple(read))
    assert len(seen) == 4 and texts.tree(0, 2).ids.tolist() == texts.tree(0, 2).ids.tolist()
    whole = dataclasses.replace(texts, whole=True).tree(0, 1)
    assert whole.ids[whole.root :].tolist() == [*ids, 1]
    assert whole.ids[: whole.root].tolist() == texts.tree(0, 1).ids[: whole.root].tolist()
