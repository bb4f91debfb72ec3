"""Failures that would be silent, each staged.

Here: 1, 2, 3, 8, 16, 18, 19, 22, 23. Elsewhere: 4, 5, 26 in test_scores.py and test_loop.py; 5, 10, 21, 24 in test_equality.py; 12 in test_resume.py; 13 in
test_recipe.py and test_cli.py; 15 and 20 in test_metrics.py and test_statistics.py; 18 also in test_data_split.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import temper
from temper import metrics
from temper.data.chat import Encoded, Encoder, Format
from temper.engine import tripwires
from temper.errors import DataError, ModelError
from temper.stages.pretrain import Shape, train_tokenizer
from temper.stages.sft import fitted
from temper.types import Outputs, Record

TOKENIZERS = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Скільки буде два і два?"},
    {"role": "assistant", "content": "Чотири."},
    {"role": "user", "content": "А три і три?"},
    {"role": "assistant", "content": "Шість, як завжди."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(
        ["Скільки буде два і два? Чотири. А три і три? Шість, як завжди."] * 3, Shape(vocabulary=400)
    )


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def trained(encoder: Encoder, example: Encoded) -> list[str]:
    """The trained runs of tokens, decoded."""
    runs: list[list[int]] = []
    before = False
    for token, on in zip(example.ids, example.trained, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return [encoder.tokenizer.decode(r, skip_special_tokens=False) for r in runs]


def test_1_answers_are_found_in_any_template_or_it_is_an_error(tokenizer: Any) -> None:
    encoder = Encoder(with_template(tokenizer, CHATML), Format(chat="template"))
    [example] = encoder.encode([Record({"messages": TALK}, "a:1")])
    assert trained(encoder, example) == ["Чотири.<eos>", "Шість, як завжди.<eos>"]
    # a template that drops earlier answers when the conversation goes on: nothing could be found where it was
    forgetful = CHATML.replace("{{ m.content }}", "{% if loop.last %}{{ m.content }}{% else %}…{% endif %}")
    with pytest.raises(ModelError, match="differently when it goes on"):
        Encoder(with_template(tokenizer, forgetful), Format(chat="template")).encode(
            [Record({"messages": TALK}, "a:1")]
        )
    with pytest.raises(DataError, match="without an answer"):
        Encoder(with_template(tokenizer, CHATML), Format(chat="template")).encode(
            [Record({"messages": TALK[:1]}, "a:1")]
        )


def test_2_an_answer_ends_with_an_end_token_or_it_is_an_error(tokenizer: Any) -> None:
    endless = CHATML.replace("<eos>", "")
    with pytest.raises(ModelError, match="does not end with an end token"):
        Encoder(with_template(tokenizer, endless), Format(chat="template")).encode([Record({"messages": TALK}, "a:1")])
    plain = Encoder(tokenizer, Format(chat="plain", separator=" "))
    [example] = plain.encode([Record({"prompt": "Два?", "completion": "Чотири."}, "a:1")])
    assert example.ids[-1] == tokenizer.eos_token_id and example.trained[-1]
    bare = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Encoder(bare, Format(chat="plain"))


def test_3_long_examples_are_counted_whether_dropped_or_cut() -> None:
    short, long = Encoded([1] * 5, [False] * 2 + [True] * 3, "a:1"), Encoded([1] * 9, [False] * 2 + [True] * 7, "a:2")
    hopeless = Encoded([1] * 9, [False] * 8 + [True], "a:3")
    trees, note = fitted([short, long], 6, "drop")
    assert len(trees) == 1 and "1 longer than 6 tokens dropped" in note
    trees, note = fitted([short, long, hopeless], 6, "cut")
    assert [len(t) for t in trees] == [5, 6] and "2 longer than 6 tokens cut (1 of them had no answer left)" in note
    with pytest.raises(DataError, match="longer than 6"):
        fitted([short, long], 6, "error")
    with pytest.raises(DataError, match="no example has at most 3"):
        fitted([short, long], 3, "drop")


def test_8_one_beginning_token_and_one_template_for_training_and_inference(tokenizer: Any) -> None:
    row = {"prompt": "Два?", "completion": "Чотири."}
    for form, template in ((Format(chat="plain", separator=" "), None), (Format(chat="template"), "<bos>" + CHATML)):
        encoder = Encoder(with_template(tokenizer, template or CHATML), form)
        for prompt in (row["prompt"], "<bos>" + row["prompt"]) if template is None else (row["prompt"],):
            record = Record({**row, "prompt": prompt}, "a:1")
            [example], [asked] = encoder.encode([record]), encoder.prompts([record])
            assert example.ids.count(tokenizer.bos_token_id) == 1
            assert example.ids[: len(asked)] == asked  # what the model is asked is what it was trained after
            answer = [i for i, on in zip(example.ids, example.trained, strict=True) if on]
            assert not any(example.trained[: len(asked)]) and tokenizer.decode(answer).strip() == "Чотири.<eos>"


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama2"])
def test_23_the_prompt_is_a_prefix_or_the_seam_moves_and_is_counted(name: str) -> None:
    if not (TOKENIZERS / name).is_dir():
        pytest.skip("shared data are absent")
    real = tf.AutoTokenizer.from_pretrained(TOKENIZERS / name)
    real.chat_template = None
    records = [Record({"prompt": p, "completion": c}, "r") for p, c in (("Hello wor", "ld"), ("A, b.", "c d"))]
    merging = Encoder(real, Format(chat="plain", separator=""))
    for record, example in zip(records, merging.encode(records), strict=True):
        prompt = merging.prompts([record])[0]
        shared = example.prompt_length
        assert example.ids[:shared] == prompt[:shared]
        assert example.moved_seam == (shared < len(prompt))
        assert real.decode(example.ids[shared:], skip_special_tokens=True).endswith(record.row["completion"])
    assert merging.encode(records[:1])[0].moved_seam  # «world» is one token, «wor» is not its prefix
    apart = Encoder(real, Format(chat="plain", separator="\n"))
    assert not any(e.moved_seam for e in apart.encode(records))


def test_qwens_own_template_trains_the_answers_and_their_end() -> None:
    if not (TOKENIZERS / "qwen2").is_dir():
        pytest.skip("shared data are absent")
    encoder = Encoder(tf.AutoTokenizer.from_pretrained(TOKENIZERS / "qwen2"), Format())
    [example] = encoder.encode([Record({"messages": TALK}, "a:1")])
    assert trained(encoder, example) == ["Чотири.<|im_end|>", "Шість, як завжди.<|im_end|>"]


def test_16_metrics_see_the_answer_alone() -> None:
    """The prompt repeats the reference word for word; were it counted, the score would not be 0."""
    out = Outputs(["кіт сидить на вікні"], ["пес"], ["кіт сидить на вікні"], [True])
    assert metrics.compute(["rougeL"], out)["rougeL"].value == 0


def rows(path: Path, n: int, *, start: int = 0) -> None:
    path.write_text(
        "".join(
            json.dumps({"q": f"Скільки буде {k} і {k}?", "a": f"Буде {2 * k}."}) + "\n" for k in range(start, start + n)
        )
    )


def recipe(folder: Path, model: Path, **sft: Any) -> Path:
    data = {"stage": "data", "prompt": "{q}", "completion": "{a}", "format": {"separator": " "}}
    stages = {
        "train": {**data, "source": "train.jsonl", "validation": 0, "test": 0},
        "asked": {**data, "source": "test.jsonl", "validation": 0, "test": 6},
        "sft": {"stage": "sft", "data": "train", "batch_size": 4, "max_steps": 2, **sft},
        "compare": {
            "stage": "evaluate",
            "models": ["base", "sft"],
            "data": "asked",
            "metrics": ["loss"],
            "resamples": 200,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(
        json.dumps({"name": "silence", "model": str(model), "threads": 1, "stages": stages}, ensure_ascii=False)
    )
    return file


def info(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "stage.json").read_text())


def test_18_19_22_in_one_run(tiny_model: Path, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 16)
    rows(tmp_path / "test.jsonl", 12, start=6)  # rows 6 to 15 stand in the training data too
    file = recipe(tmp_path, tiny_model, warmup=5)
    run = temper.run(file, out=tmp_path / "run", quiet=True)
    # 18: test rows in the training data of a model that is compared
    assert any("stand in the training data of sft" in w for w in info(run, "compare")["warnings"])
    # 22: two steps are less than an epoch of four, and less than the warm-up
    warnings = " ".join(info(run, "sft")["warnings"])
    assert "before the first epoch is through (4 steps)" in warnings and "never reaches its value" in warnings
    # 19: other data under the same name, then another template: nothing old is read
    before = info(run, "sft")["key"]
    rows(tmp_path / "train.jsonl", 16, start=100)
    temper.run(file, out=run, quiet=True)
    other_data = info(run, "sft")["key"]
    assert other_data != before
    assert not any("stand in the training data" in w for w in info(run, "compare")["warnings"])
    file.write_text(file.read_text().replace("{q}", "Питання: {q}"))
    temper.run(file, out=run, quiet=True)
    assert info(run, "sft")["key"] not in (before, other_data)
    assert info(run, "asked")["config"]["prompt"] == "Питання: {q}"


def test_22_a_schedule_that_never_moved_and_an_early_end_are_told() -> None:
    assert "never moved" in tripwires.after(schedule="cosine", rates=[1e-4] * 3, took=9, planned=9)[0]
    assert "after 4 of 9 steps" in tripwires.after(schedule="cosine", rates=[1e-4, 9e-5, 1e-5], took=4, planned=9)[0]
    assert tripwires.after(schedule="cosine", rates=[1e-4, 9e-5, 1e-5], took=9, planned=9) == []
