"""Failures that would be silent, each staged.

Here: what reads rows, templates and answers (1, 2, 3, 8, 15, 16, 23) and keys (13). In whole runs, which is where one
stage must tell the next, see test_silences_in_runs.py: 2, 3, 8, 10, 16, 18, 19, 20, 21, 22, 24, 26. Elsewhere: 4, 5 and 26
in test_scores.py and test_loop.py; 5, 10, 21 and 24 in test_equality.py and test_adapters.py; 12 in test_resume.py; 13
also in test_recipe.py and test_cli.py; 15 and 20 in test_metrics.py and test_statistics.py; 18 in test_data_split.py.
"""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import transformers as tf
from rouge_score import rouge_scorer

import temper
import temper.stages
from temper import metrics
from temper import recipe as recipes
from temper.data.chat import Encoded, Encoder
from temper.data.forms import Format
from temper.engine import tripwires
from temper.engine.chains import Chains
from temper.errors import DataError, ModelError, RecipeError
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
    short, long = ([1] * 5, [False] * 2 + [True] * 3, "a:1"), ([1] * 9, [False] * 2 + [True] * 7, "a:2")
    hopeless = ([1] * 9, [False] * 8 + [True], "a:3")
    trees, note = fitted(Chains([short, long]), 6, "drop")
    assert len(trees) == 1 and "1 longer than 6 tokens dropped" in note
    trees, note = fitted(Chains([short, long, hopeless]), 6, "cut")
    assert [len(t) for t in trees] == [5, 6] and "2 longer than 6 tokens cut (1 of them had no answer left)" in note
    with pytest.raises(DataError, match="longer than 6"):
        fitted(Chains([short, long]), 6, "error")
    with pytest.raises(DataError, match="no example fits into 3 tokens"):
        fitted(Chains([short, long]), 3, "drop")
    with pytest.raises(
        DataError, match="1 of 2 examples are longer than the 6 tokens of the model's context"
    ) as caught:
        fitted(Chains([short, long]), 6, "error", context=6)
    assert "max_length" not in str(caught.value), "what the model cannot take is not offered"


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


def test_22_a_schedule_that_never_moved_and_an_early_end_are_told() -> None:
    assert "never moved" in tripwires.after(schedule="cosine", rates=[1e-4] * 3, took=9, planned=9)[0]
    assert "after 4 of 9 steps" in tripwires.after(schedule="cosine", rates=[1e-4, 9e-5, 1e-5], took=4, planned=9)[0]
    assert tripwires.after(schedule="cosine", rates=[1e-4, 9e-5, 1e-5], took=9, planned=9) == []


def test_1_a_template_that_refuses_a_role_is_a_message_not_a_traceback(tokenizer: Any) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    encoder = Encoder(with_template(tokenizer, refusal + CHATML), Format(chat="template", system="Стисло."))
    with pytest.raises(ModelError, match=r"system, user.*no system role"):
        encoder.encode([Record({"prompt": "Два?", "completion": "Чотири."}, "a:1")])


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_8_a_template_that_writes_the_beginning_token_itself(name: str) -> None:
    if not (TOKENIZERS / name).is_dir():
        pytest.skip("shared data are absent")
    real = tf.AutoTokenizer.from_pretrained(TOKENIZERS / name)
    if name == "qwen2":  # it has none of its own
        real.bos_token = "<|im_start|>"
    real.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder = Encoder(real, Format())
    record = Record({"prompt": "Two and two?", "completion": "Four."}, "a:1")
    [example], [asked] = encoder.encode([record]), encoder.prompts([record])
    assert example.ids.count(real.bos_token_id) == 1 and example.ids[: len(asked)] == asked
    assert trained(encoder, example)[0].strip() == f"Four. {real.eos_token}"


def test_13_every_key_of_every_stage_is_read_somewhere() -> None:
    """A key that nothing reads would be a silence of our own; one with a single value decides nothing yet."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in Path(temper.__file__).parent.rglob("*.py"))
    unread = []

    def look(config: Any, path: str) -> None:
        for name, field in config.model_fields.items():
            only = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
            if len(only) != 1 and not re.search(rf"\.{name}\b|[\"']{name}[\"']", source):
                unread.append(f"{path}.{name}")
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(kind, "model_fields"):
                    look(kind, f"{path}.{name}")

    for kind in recipes.stages:
        look(recipes.stages.get(kind), kind)
    assert not unread


@pytest.mark.parametrize("kind", list(recipes.stages))
def test_13_every_key_misspelt_is_refused_with_its_right_name(kind: str, tmp_path: Path) -> None:
    for name in recipes.stages.get(kind).model_fields:
        file = tmp_path / "misspelt.yaml"
        file.write_text(json.dumps({"name": "x", "model": "m", "stages": {"one": {"stage": kind, f"{name}x": 1}}}))
        with pytest.raises(RecipeError) as raised:
            recipes.load(file)
        assert f"{name}x" in raised.value.what and name in raised.value.do


def test_15_rouge_reads_ukrainian() -> None:
    """rouge-score's own tokenizer keeps a–z and digits alone."""
    same, number = "Пожежа в Сумах: 48 людей", "Ціни зросли на 48 відсотків"
    default = rouge_scorer.RougeScorer(["rouge1"])
    assert default.score("кіт сидить", "кіт сидить")["rouge1"].fmeasure == 0
    assert default.score(same, number)["rouge1"].fmeasure == 1
    ours = Outputs(["", ""], ["кіт сидить", number], ["кіт сидить", same], [True, True])
    equal, different = metrics.compute(["rouge1"], ours)["rouge1"].rows
    assert equal == 1 and 0 < different < 0.5
