"""Chat templates: trained tokens are exactly the answers with their end tokens, for every real tokenizer, with marks of the
template's own and without; speakers' prefixes where there is no template; templates that take too much."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

import temper
from temper import hub
from temper.data import written
from temper.data.chat import Encoder
from temper.data.forms import Format
from temper.errors import ModelError
from temper.models import load
from temper.types import Record
from test_chat import CHATML, FORGETFUL, REAL, real, records, runs, small, text
from tiny_models import build

SHARED = REAL.parent
SENTENCEPIECE = "ru_sp_m50"
MARKED = (  # marks around the words alone, the end token outside
    "{% for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\n' }}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {%- generation %}\n        {{- m.content }}{% endgeneration %}\n"
    "    {%- else %}{{ m.content }}{% endif %}\n    {{- '<|im_end|>\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}"
)
CLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\n"
    "{% generation %}\n{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}\n{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"without marks": CHATML, "marks": MARKED, "marks with the end": CLOSED}


def gemma() -> str:
    file = REAL / "gemma3_config_only" / "chat_template.jinja"
    if not file.is_file():
        pytest.skip("real templates are not here")
    return file.read_text()


def tokenizer(name: str) -> Any:
    if name == "small":
        return small()
    if name == SENTENCEPIECE:
        if not (REAL / name).is_dir():
            pytest.skip("real tokenizers are not here")
        return of_sentencepiece(REAL / name / "m50.model")
    return copy.deepcopy(real(name))


def of_sentencepiece(file: Path) -> Any:
    """A SentencePiece model of unigrams as transformers has them; its ids are those of SentencePiece itself."""
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(file.read_bytes())
    made = Tokenizer(models.Unigram([(p.piece, p.score) for p in spec.pieces], unk_id=0))
    made.normalizer = normalizers.Precompiled(spec.normalizer_spec.precompiled_charsmap)
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert made.encode("Привет, как дела?").ids == own.encode("Привет, как дела?")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def with_tokens(made: Any, *names: str) -> Any:
    made.add_tokens([AddedToken(n, special=True, normalized=False) for n in names], special_tokens=True)
    return made


NAMES = ["small", "gpt2", "qwen2", "llama2", "t5", SENTENCEPIECE]


def dialogues() -> list[list[dict[str, str]]]:
    """Real ones of two to six turns, and made-up ones that are hard to cut."""
    hard = [
        ["Hi", "Hello."],
        ["a", "b\n", "c", " d "],
        ["Сколько будет 2 + 2?", "Чотири.", "And 3?\n\nreally", "Six.\nYes"],
        ["x", "<|im_end", "y", "assistant\nuser"],
        ["🙂 漢字", "naïve — «да»", "…", "!?"],
    ]
    file = SHARED / "ru_anekdots_dialogs" / "dialogs_45k.jsonl"
    if file.is_file():
        lines = [json.loads(line)["parsed"] for line in file.read_text().splitlines()[:400]]
        hard += [turns[: len(turns) // 2 * 2] for turns in lines[:120]]
    return [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)] for turns in hard]


def lost(made: Any, talk: list[dict[str, str]]) -> bool:
    """Whether a tokenizer has no pieces for some of it (T5's: Cyrillic, the sign <)."""
    return made.unk_token_id != made.eos_token_id and any(
        made.unk_token_id in made(m["content"])["input_ids"] for m in talk
    )


def check(made: Any, form: Format, ends: list[str]) -> None:
    """Checked by decoding: each trained run is one answer and one end token; decoding the others gives no answer's words."""
    encoder = Encoder(made, form)
    talks = [t for t in dialogues() if not lost(made, t)]
    assert talks
    for talk, example in zip(talks, encoder.encode(records([{"messages": t} for t in talks])), strict=True):
        wanted = [m["content"] for m in talk if m["role"] == "assistant"]
        got = runs(example)
        assert len(got) == len(wanted), talk
        for ids, answer in zip(got, wanted, strict=True):
            end = text(made, ids[-1:])
            assert end in ends and ids[-1] in encoder.end_ids
            plain = text(made, ids[:-1])
            assert same(plain, answer, made), (plain, answer)
        # all of it is the template's own text, nothing more and nothing less
        whole = made.apply_chat_template(talk, tokenize=False)
        assert example.ids == made(whole, add_special_tokens=False)["input_ids"]
        (prompt,) = encoder.prompts(records([{"messages": talk}]))
        last = len(example.trained) - example.trained[::-1].index(True) - len(got[-1])
        assert prompt == example.ids[:last] or (example.moved_seam and prompt[:last] == example.ids[:last])


def same(decoded: str, answer: str, made: Any) -> bool:
    """Equal but for what SentencePiece models take away: blanks, and forms of characters (NFKC)."""
    squeeze = lambda t: re.sub(r"\s+", " ", unicodedata.normalize("NFKC", t)).strip()  # noqa: E731
    return squeeze(decoded) == squeeze(answer)


@pytest.mark.parametrize("marks", TEMPLATES)
@pytest.mark.parametrize("name", NAMES)
def test_answers_through_templates_with_and_without_marks(name: str, marks: str) -> None:
    made = with_tokens(tokenizer(name), "<|im_start|>", "<|im_end|>")
    made.chat_template = TEMPLATES[marks]
    check(made, Format(), ["<|im_end|>"])


def test_the_template_that_qwen_brings() -> None:
    check(tokenizer("qwen2"), Format(), ["<|im_end|>"])


def test_a_template_that_leaves_answers_out() -> None:
    """A real one, which writes the first message alone."""
    made = small(gemma())
    with pytest.raises(ModelError, match="the chat template leaves the answer out"):
        Encoder(made, Format()).encode(records([{"prompt": "q", "completion": "a"}]))


@pytest.mark.parametrize(
    ("name", "teach"),
    [(n, True) for n in NAMES if n != "qwen2"] + [(n, False) for n in ("small", "gpt2", "llama2")],
)
def test_speakers_where_there_is_no_template(name: str, teach: bool) -> None:
    made = tokenizer(name)
    before = len(made)
    encoder = Encoder(made, Format(chat="speakers"), teach=teach)
    assert len(made) == before + 3 * teach and encoder.tokens == 3 * teach
    talks = [t for t in dialogues() if not lost(made, t)]
    if not teach:  # a prefix of ordinary pieces may merge with an answer's first character: counted, and told by sft
        talks = [t for t in talks if "<|" not in t[1]["content"]]
    examples = encoder.encode(records([{"messages": t} for t in talks]))
    assert not any(e.moved_seam for e in examples)
    for talk, example in zip(talks, examples, strict=True):
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        for ids, answer in zip(runs(example), answers, strict=True):
            assert text(made, ids[-1:]) == made.eos_token and same(text(made, ids[:-1]), answer, made)
        if teach:
            marks = made.convert_tokens_to_ids(["<user>", "<assistant>"])
            assert [i for i in example.ids if i in marks] == [marks[m["role"] == "assistant"] for m in talk]


def test_marks_are_those_that_transformers_finds() -> None:
    """And the way without marks finds the same answers in the same texts."""
    marked = with_tokens(small(), "<|im_start|>", "<|im_end|>")
    marked.chat_template = CLOSED
    rows = records([{"messages": t} for t in dialogues()])
    found = Encoder(marked, Format()).encode(rows)
    theirs = marked.apply_chat_template(
        [r.row["messages"] for r in rows], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [[int(t) for t in e.trained] for e in found] == theirs["assistant_masks"]
    plain = copy.deepcopy(marked)
    plain.chat_template = re.sub(r"{%-? (end)?generation -?%}\n?", "", CLOSED)
    again = Encoder(plain, Format()).encode(rows)
    assert [(e.ids, e.trained) for e in again] == [(e.ids, e.trained) for e in found]


def test_marks_find_answers_in_a_template_that_rewrites_what_was_said() -> None:
    made = small(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": r, "content": f"x{k}"} for k, r in enumerate(("user", "assistant", "user", "assistant"))]
    with pytest.raises(ModelError, match="cannot be found"):
        Encoder(small(FORGETFUL), Format()).encode(records([{"messages": turns}]))
    (example,) = Encoder(made, Format()).encode(records([{"messages": turns}]))
    assert [text(made, r) for r in runs(example)] == ["x1<|im_end|>", "<think></think>x3<|im_end|>"]


def test_a_prompt_that_is_not_what_stands_before_the_answers() -> None:
    """It would be trained on one prompt, and asked another."""
    made = with_tokens(small(), "<|im_start|>", "<|im_end|>")
    made.chat_template = CLOSED.replace("assistant\n{% endif %}", "assistant: {% endif %}")
    with pytest.raises(ModelError, match="asks for an answer otherwise than"):
        Encoder(made, Format()).encode(records([{"prompt": "q", "completion": "a"}]))


# Prefixes


def test_a_prefix_that_is_a_token_already() -> None:
    made = with_tokens(small(), "<user>")
    with pytest.raises(ModelError, match="«<user>» is a token of this tokenizer already") as caught:
        Encoder(made, Format(chat="speakers"), teach=True)
    assert "speakers" in caught.value.do
    Encoder(made, Format(chat="speakers", speakers={"user": "<q>", "assistant": "<a>"}), teach=True)


@pytest.mark.parametrize(
    "speakers", [{"user": "<u>"}, {"user": "<u>", "assistant": "<u>"}, {"user": " ", "assistant": "<a>"}]
)
def test_prefixes_that_cannot_tell_who_speaks(speakers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Format(chat="speakers", speakers=speakers)  # type: ignore[arg-type]


def test_a_role_without_a_prefix() -> None:
    encoder = Encoder(small(), Format(chat="speakers", speakers={"user": "<q>", "assistant": "<a>"}))
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(ModelError, match="no prefix is given for the role system"):
        encoder.encode(records([{"messages": turns}]))


def test_new_tokens_are_trained_saved_and_found_again(tmp_path: Path) -> None:
    """sft of a whole model without a template: longer embeddings, a template, and what is opened is what was trained."""
    base = tmp_path / "base"
    made = small()
    hf = build("gpt2")
    hf = GPT2LMHeadModel(type(hf.config)(**{**hf.config.to_dict(), "vocab_size": len(made), "eos_token_id": made.eos_token_id, "bos_token_id": made.bos_token_id}))  # fmt: skip
    hf.save_pretrained(base)
    made.save_pretrained(base)
    rows = [{"parsed": [f"q {k}", f"a {k}"]} for k in range(24)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw: dict[str, Any] = {
        "name": "x", "seed": 1, "threads": 1, "model": str(base),
        "stages": {
            "jokes": {"stage": "data", "source": "a.jsonl", "messages": "{parsed}", "format": {"chat": "speakers"}, "validation": 4, "test": 4},
            "full": {"stage": "sft", "model": "base", "data": "jokes", "max_steps": 3, "batch_size": 4, "lr": 1e-2, "samples": 1},
            "lora": {"stage": "sft", "model": "base", "data": "jokes", "adapter": {"method": "lora", "r": 2}, "max_steps": 2, "batch_size": 4},
            "more": {"stage": "sft", "model": "full", "data": "jokes", "max_steps": 1, "batch_size": 4},
            "compare": {"stage": "evaluate", "models": ["base", "full", "lora", "more"], "data": "jokes", "metrics": ["token_f1"], "decoding": {"max_new_tokens": 4}, "resamples": 200},
        },
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(raw))
    run = temper.run(tmp_path / "own.yaml", out=tmp_path / "run", quiet=True)
    saved = AutoTokenizer.from_pretrained(run / "full/model")
    again, _ = load.model(hub.Source(str(run / "full/model")))
    assert len(saved) == len(made) + 3 == again.get_input_embeddings().weight.shape[0] == again.config.vocab_size
    assert set(saved.convert_tokens_to_ids(["<system>", "<user>", "<assistant>"])) == set(
        range(len(made), len(made) + 3)
    )
    assert saved.chat_template and "<user>" in saved.chat_template
    rows_ = records([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    (example,) = Encoder(saved, Format()).encode(rows_)  # whoever opens it needs no format of ours
    assert text(saved, runs(example)[0]) == "a" + saved.eos_token
    assert "special_tokens_added" in json.dumps(json.loads((run / "full/stage.json").read_text())).replace(" ", "_")
    unchanged = AutoTokenizer.from_pretrained(run / "lora/adapter")
    assert len(unchanged) == len(made) and unchanged.chat_template == saved.chat_template
    later = AutoTokenizer.from_pretrained(run / "more/model")
    assert len(later) == len(saved), "a model that has them gets no others"


# Templates that take too much


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}x", "10 s"),
        ("{{ 'x' * 40000000 }}", "characters"),
        ("{{ 'x' * 3000000000 }}", "MB"),
        ("{% for m in messages %}{{ m.content * 90000000 }}{% endfor %}", "MB"),
    ],
)
def test_a_template_without_bounds_is_refused(template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "SECONDS", 10 if said != "10 s" else 1)
    encoder = Encoder(small(template), Format())
    with pytest.raises(ModelError, match="takes more than") as caught:
        encoder.encode(records([{"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "x"}]}]))  # fmt: skip
    assert said.replace("10 s", "1 s") in caught.value.what and "plain" in caught.value.do
    with pytest.raises(ModelError, match="takes more than"):
        encoder.prompts(records([{"prompt": "Hello there"}]))


def test_templates_reach_nothing_but_what_they_are_given() -> None:
    """transformers' sandbox, on which this rests."""
    reaching = "{{ messages.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="refuses"):
        Encoder(small(reaching), Format()).encode(records([{"prompt": "x", "completion": "y"}]))


@pytest.mark.parametrize(
    "template", ["{% for i in range(1000000) %}x{% endfor %}", "{{ }", "{{ messages.nothing.at_all }}"]
)
def test_a_broken_template_is_told_as_one(template: str) -> None:
    with pytest.raises(ModelError, match="the chat template cannot be run") as caught:
        Encoder(small(template), Format()).encode(records([{"prompt": "x", "completion": "y"}]))
    assert "mend" in caught.value.do


def test_special_tokens_within_what_is_said_are_counted() -> None:
    encoder = Encoder(small(), Format(chat="speakers"), teach=True)
    rows = [{"prompt": "q", "completion": a} for a in ("plain", "<user> says", "and <user> too", "<assistant>")]
    encoder.encode(records(rows))
    assert encoder.intruders == {"<user>": 2, "<assistant>": 1}


def test_a_template_that_raises_is_told_with_its_words(make: Callable[[], Any] = lambda: small(CHATML)) -> None:
    made = make()
    made.chat_template = "{{ raise_exception('only haikus') }}"
    with pytest.raises(ModelError, match="refuses a conversation of the roles user, assistant: only haikus"):
        Encoder(made, Format()).encode([Record({"prompt": "x", "completion": "y"}, "a:1")])
