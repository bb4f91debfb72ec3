"""The examples with the highest loss: their lines in worst.jsonl, and how the report draws them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temper
from temper import report
from temper.engine.examples import BEFORE, LONGEST, lines, pieces_of
from temper.engine.validation import Example
from temper.report.worst import hardest, shade
from temper.stages.pretrain import Shape, train_tokenizer
from temper.trees import chain, group

TEXTS = ["Кіт 🐈 сидить на вікні, а пес — ні.", "naïve café 漢字", "a" * 40 + " 🐈🐈🐈"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Almost all of its pieces are bytes: most characters are spread over several."""
    return train_tokenizer(["abc abc"], Shape(vocabulary=300))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_together_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    found = pieces_of(tokenizer)(ids)
    assert len(found) == len(ids) > 8 and "".join(found) == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    if "🐈" in text:
        assert "🐈" in found and "" in found, "a character stands at the last of its bytes"


def test_branches_stand_apart(tokenizer: Any) -> None:
    prompt, good, bad = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Хто?", "Кіт.", "Пес"))
    tree = group(prompt, [good, bad], "pairs.jsonl:7")
    losses = np.arange(len(good) + len(bad)) + 0.5
    (line,) = lines([Example(tree, 2.0, losses)], pieces_of(tokenizer))
    assert ["".join(p["tokens"]) for p in line["parts"]] == ["Хто?", "Кіт.", "Пес"]
    assert line["parts"][0]["losses"] == [None] * len(prompt)
    assert [x for p in line["parts"][1:] for x in p["losses"]] == losses.tolist()
    assert (line["rank"], line["loss"], line["where"], line["left_out"]) == (1, 2.0, "pairs.jsonl:7", 0)


def test_of_a_long_example_the_part_around_its_first_scored_token_is_kept(tokenizer: Any) -> None:
    ids = tokenizer("a" * 3000)["input_ids"]
    tree = chain(ids, [0.0] * 500 + [1.0] * (len(ids) - 500))
    (line,) = lines([Example(tree, 1.0, np.ones(len(tree.tgt)))], pieces_of(tokenizer))
    (part,) = line["parts"]
    assert len(part["tokens"]) == LONGEST and line["left_out"] == len(ids) - LONGEST > 0
    assert part["losses"][:BEFORE] == [None] * BEFORE and part["losses"][BEFORE] == 1.0


def test_the_last_validation_is_shown_and_the_one_over_all_rows_before_others() -> None:
    def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
        return {"step": step, "rank": 1, "loss": loss, "where": "x", "parts": [{"tokens": ["a"], "losses": [loss]}], "left_out": 0, **more}  # fmt: skip

    assert hardest([]) is None
    found = hardest([line(2, 1.0), line(4, 3.0), line(4, 2.0)])
    assert found is not None and (found.step, [e.loss for e in found.examples]) == (4, [3.0, 2.0])
    found = hardest([line(2, 1.0), line(4, 3.0), line(2, 5.0, whole=True)])
    assert found is not None and (found.step, found.whole, [e.loss for e in found.examples]) == (2, True, [5.0])
    found = hardest([{"step": 4, "rank": 1}, line(4, 3.0)])
    assert found is not None and len(found.examples) == 1, "a broken line is left out"
    assert [shade(-math.log(p)) for p in (0.9, 0.4, 0.1, 0.02, 0.001)] == [0, 1, 2, 3, 4]


RECIPE = """
name: worst
model: {model}
stages:
  train: {{stage: data, source: rows.jsonl, prompt: "{{q}}", completion: "{{a}}", validation: 8, test: 0, near_leaks: false}}
  sft: {{stage: sft, data: train, max_steps: 4, evaluate_every: 2, batch_size: 4, lr: 1e-3, samples: 0, worst: 3}}
  small: {{stage: pretrain, data: texts, max_steps: 1, activation_checkpointing: true, shape: {{vocabulary: 300, hidden: 32, layers: 2, heads: 2, context: 64}}}}
  texts: {{stage: data, source: rows.jsonl, text: "{{q}} {{a}}", validation: 4, test: 0, near_leaks: false}}
"""


def test_in_a_run_and_on_its_page(tiny_model: Path, tmp_path: Path) -> None:
    """Two stages; <script> in a row is text; what was really used is printed, activation checkpointing too."""
    rows = [{"q": f"Питання {k} <script>?", "a": f"Відповідь {k * k} <b>."} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    run = temper.run(tmp_path / "recipe.yaml", out=tmp_path / "run", quiet=True)
    found = [json.loads(line) for line in (run / "sft" / "worst.jsonl").read_text("utf-8").splitlines()]
    assert [(line["step"], line["rank"]) for line in found] == [(2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3)]
    for line in found:
        (part,) = line["parts"]
        scored = [x for x in part["losses"] if x is not None]
        assert line["loss"] == pytest.approx(np.mean(scored), abs=1e-4)
        assert "Питання" in "".join(part["tokens"]) and line["where"].startswith("rows.jsonl")
    assert (run / "small" / "worst.jsonl").is_file()
    page = report.build([run]).read_text("utf-8")
    assert page.count("The validation examples with the highest loss") == 2
    assert "nats, p = " in page and "<sub>" in page and "<script>" not in page.partition("<body")[2]
    used = {name: json.loads((run / name / "stage.json").read_text("utf-8")) for name in ("small", "sft")}
    assert [used[n]["facts"]["activation_checkpointing"] for n in used] == [True, False]
    assert "layout tree: " in used["small"]["summary"] and "activation checkpointing on" in used["small"]["summary"]
    assert "activation checkpointing off" in used["sft"]["summary"]
    assert "validation: 2 times, every 2 steps, on all 8 examples" in used["sft"]["summary"]
