"""Rows → tokens: what is trained is exactly the answers with their end tokens, checked by decoding it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from temper.data.chat import Encoded, Encoder, show
from temper.data.forms import Format
from temper.errors import DataError, ModelError
from temper.stages.pretrain import Shape, train_tokenizer
from temper.stages.sft import tree_of
from temper.types import Record

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "tokenizers"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # an end token of the tokenizer's own, a beginning that the template writes itself
    "<bos>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<eos>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
STRICT = (
    "{{ '<bos>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
FORGETFUL = (  # earlier answers are written shorter than the last
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Стисло перекажи новину: у Києві відкрили новий парк.",
    "У Києві відкрили парк. Was ist das? 12 345,67 € — “quoted” 漢字 🙂\nnew line\n\n  indented",
    "abc <|im_start|> user assistant [INST] model turn",
]


@functools.cache
def trained_here() -> Any:
    return train_tokenizer(TEXTS, Shape(vocabulary=330))


def small(
    template: str | None = None, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<turn>", "</turn>")
) -> Any:
    """A byte-level tokenizer made by the project, with <bos> before every text, and a chat template."""
    made = copy.deepcopy(trained_here())
    if template is not None:
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.chat_template = template
    return made


@functools.cache
def real(name: str) -> Any:
    if not (REAL / name).is_dir():
        pytest.skip("real tokenizers are not here")
    if name == "llama2":
        return LlamaTokenizer.from_pretrained(REAL / name, add_bos_token=True)
    return T5Tokenizer.from_pretrained(REAL / name) if name == "t5" else AutoTokenizer.from_pretrained(REAL / name)


PLAIN: dict[str, Callable[[], Any]] = {
    "small": small,
    "gpt2": lambda: real("gpt2"),
    "llama2": lambda: real("llama2"),
    "qwen2": lambda: real("qwen2"),
    "t5": lambda: real("t5"),
}
CHATS: dict[str, Callable[[], Any]] = {
    "chatml": lambda: small(CHATML),
    "brackets": lambda: small(BRACKETS),
    "strict": lambda: small(STRICT),
    "qwen2": lambda: real("qwen2"),
}
ROWS = [
    {"prompt": "Question: 2 + 2?", "completion": "Answer: 4."},
    {"prompt": "Стисло перекажи новину:\nУ Києві відкрили парк.", "completion": "Відкрили парк."},
    {"prompt": "A", "completion": "multi\nline\n\nanswer with 123 numbers"},
    {"prompt": "Ends in space ", "completion": " Begins in one"},
]


def records(rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(row, f"rows.jsonl:{k + 1}") for k, row in enumerate(rows)]


def runs(example: Encoded) -> list[list[int]]:
    """The trained runs of token ids, in order."""
    pairs = zip(example.trained, example.ids, strict=True)
    return [[i for _, i in part] for trained, part in groupby(pairs, key=lambda p: p[0]) if trained]


def text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rows_train_the_answer_and_its_end(name: str) -> None:
    tokenizer = PLAIN[name]()
    rows = [r for r in ROWS if name != "t5" or r["prompt"].isascii()]  # T5's pieces lack Cyrillic
    encoder = Encoder(tokenizer, Format(chat="plain"))
    assert encoder.end_ids == {tokenizer.eos_token_id}
    examples = encoder.encode(records(rows))
    prompts = encoder.prompts(records(rows))
    for row, example, prompt in zip(rows, examples, prompts, strict=True):
        (trained,) = runs(example)
        assert trained[-1] == tokenizer.eos_token_id and trained.count(tokenizer.eos_token_id) == 1
        if not example.moved_seam:
            said = text(tokenizer, trained[:-1])
            assert said.split() == row["completion"].split()
            if name in {"small", "gpt2", "qwen2"}:
                assert said == row["completion"]
            assert example.ids[: example.prompt_length] == prompt
        assert example.where == f"rows.jsonl:{rows.index(row) + 1}"
        whole = tokenizer(row["prompt"] + "\n" + row["completion"])["input_ids"]
        assert example.ids == whole if whole[-1] == tokenizer.eos_token_id else example.ids == [*whole, trained[-1]]
    assert sum(e.moved_seam for e in examples) == 0


@pytest.mark.parametrize("name", ["small", "llama2"])
def test_one_beginning_of_sequence(name: str) -> None:
    """Added once, even where the text writes it too; and the tree never predicts it."""
    tokenizer = PLAIN[name]()
    bos = tokenizer.bos_token_id
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": f"{tokenizer.bos_token}q", "completion": "a"}, {"text": "t"}]
    encoder = Encoder(tokenizer, Format(chat="plain"))
    for example in encoder.encode(records(rows)):
        assert example.ids[0] == bos and example.ids.count(bos) == 1
        assert 0 not in tree_of(example).tgt
    assert [p.count(bos) for p in encoder.prompts(records(rows[:2]))] == [1, 1]


def test_a_template_that_writes_its_own_beginning_gets_no_second() -> None:
    tokenizer = small(BRACKETS)
    encoder = Encoder(tokenizer, Format())
    (example,) = encoder.encode(records(ROWS[:1]))
    assert example.ids.count(tokenizer.bos_token_id) == 1 and example.ids[0] == tokenizer.bos_token_id
    without = Encoder(small(CHATML), Format()).encode(records(ROWS[:1]))[0]
    assert tokenizer.bos_token_id not in without.ids, "a template decides whether there is one"


@pytest.mark.parametrize("name", CHATS)
def test_conversations_train_every_answer(name: str) -> None:
    tokenizer = CHATS[name]()
    encoder = Encoder(tokenizer, Format())
    turns = [
        {"role": "user", "content": "Скільки буде 2 + 2?"},
        {"role": "assistant", "content": "Чотири."},
        {"role": "user", "content": "And 3?\n\nreally"},
        {"role": "assistant", "content": "Six.\nYes"},
    ]
    (example,) = encoder.encode(records([{"messages": turns}]))
    end = {"brackets": "<eos>", "strict": "</turn>"}.get(name, "<|im_end|>")
    assert [text(tokenizer, r).strip() for r in runs(example)] == [f"Чотири.{end}", f"Six.\nYes{end}"]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert example.ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    (prompt,) = encoder.prompts(records([{"messages": turns}]))
    last = len(example.trained) - example.trained[::-1].index(True) - len(runs(example)[-1])
    assert prompt == example.ids[:last] and not example.moved_seam
    assert tokenizer.convert_tokens_to_ids(end) in encoder.end_ids
    assert encoder.reference_text({"messages": turns}) == "Six.\nYes"


@pytest.mark.parametrize("name", CHATS)
def test_pairs_through_a_template(name: str) -> None:
    tokenizer = CHATS[name]()
    encoder = Encoder(tokenizer, Format())
    examples = encoder.encode(records(ROWS[:3]))
    for row, example, prompt in zip(ROWS, examples, encoder.prompts(records(ROWS[:3])), strict=False):
        (trained,) = runs(example)
        assert text(tokenizer, trained[:-1]).strip() == row["completion"].strip()
        assert example.ids[: example.prompt_length] == prompt
        assert trained[-1] in encoder.end_ids


def test_prompts_made_of_messages_are_the_same_rows() -> None:
    encoder = Encoder(small(CHATML), Format())
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello."}
    forms = [
        {"prompt": [system, user], "completion": [answer]},
        {"prompt": [system, user], "completion": "Hello."},
        {"messages": [system, user, answer]},
    ]
    first, *others = encoder.encode(records(forms))
    assert all((e.ids, e.trained) == (first.ids, first.trained) for e in others)
    assert {encoder.reference_text(f) for f in forms} == {"Hello."}
    assert len({tuple(p) for p in encoder.prompts(records(forms))}) == 1
    system_less = Encoder(small(CHATML), Format(system="Be brief.")).encode(
        records([{"prompt": "Hi", "completion": "Hello."}])
    )
    assert system_less[0].ids == first.ids, "a system message of the recipe stands before rows without one"
    again = Encoder(small(CHATML), Format(system="Other.")).encode(records(forms[:1]))
    assert again[0].ids == first.ids, "a row's own stays"


def test_a_system_message_in_the_plain_form() -> None:
    tokenizer = small()
    (example,) = Encoder(tokenizer, Format(system="Be brief.", separator="\nA: ")).encode(records(ROWS[:1]))
    assert text(tokenizer, example.ids) == "<bos>Be brief.\nQuestion: 2 + 2?\nA: Answer: 4.<eos>"
    (trained,) = runs(example)
    assert text(tokenizer, trained) == " Answer: 4.<eos>", "the blank belongs to the word after it"


def test_a_seam_inside_a_token_moves_back_and_is_counted() -> None:
    tokenizer = PLAIN["gpt2"]()
    rows = [{"prompt": "x =", "completion": "= 3"}, {"prompt": "x", "completion": "y"}]
    glued = Encoder(tokenizer, Format(chat="plain", separator="")).encode(records([rows[0]]))[0]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x ==")["input_ids"]) == ["x", "Ġ=="]
    assert glued.moved_seam and text(tokenizer, runs(glued)[0]) == " == 3<|endoftext|>"
    assert not Encoder(tokenizer, Format(chat="plain")).encode(records([rows[1]]))[0].moved_seam


def test_plain_text_is_trained_whole_with_an_end() -> None:
    for tokenizer in (small(), PLAIN["gpt2"](), PLAIN["t5"]()):
        encoder = Encoder(tokenizer, Format())
        (example,) = encoder.encode(records([{"text": "hello world"}]))
        assert all(example.trained) and example.ids[-1] == tokenizer.eos_token_id
        assert example.ids.count(tokenizer.eos_token_id) == 1
        assert encoder.prompt_text({"text": "hello"}) == "" and encoder.reference_text({"text": "hello"}) == "hello"
        with pytest.raises(DataError, match="no prompt") as error:
            encoder.prompts(records([{"text": "hello"}]))
        assert error.value.where == "rows.jsonl:1"


def test_the_marker_shown_before_training_is_the_trained_part() -> None:
    tokenizer = small(CHATML)
    encoder = Encoder(tokenizer, Format())
    (example,) = encoder.encode(records([{"prompt": "Hi", "completion": "Hello."}]))
    assert show(tokenizer, example) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    assert len(show(tokenizer, Encoded([5] * 5000, [True] * 5000, ""), limit=100)) < 120


# What would train the wrong thing


def test_an_answer_that_cannot_be_found_is_refused() -> None:
    """A template that writes earlier answers differently: training on them would teach another prompt."""
    encoder = Encoder(small(FORGETFUL), Format())
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ModelError, match="cannot be found") as error:
        encoder.encode(records([{"messages": turns}]))
    assert "rows.jsonl:1" in error.value.where


def test_a_template_without_an_end_token_is_refused() -> None:
    with pytest.raises(ModelError, match="never learn to stop"):
        Encoder(small(NO_END), Format()).encode(records(ROWS[:1]))


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = small()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Encoder(tokenizer, Format())


def test_what_needs_a_template_says_so() -> None:
    with pytest.raises(ModelError, match="the tokenizer has none"):
        Encoder(small(), Format(chat="template"))
    encoder = Encoder(small(), Format())
    for row in ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
                {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}):  # fmt: skip
        with pytest.raises(DataError, match="needs a chat template"):
            encoder.encode(records([row]))


def test_a_conversation_without_an_answer_or_with_an_empty_one() -> None:
    encoder = Encoder(small(CHATML), Format())
    with pytest.raises(DataError, match="without an answer"):
        encoder.encode(records([{"messages": [{"role": "user", "content": "x"}]}]))
    (example,) = encoder.encode(records([{"prompt": "x", "completion": ""}]))
    assert text(encoder.tokenizer, runs(example)[0]) == "<|im_end|>", "only the end is learnt"


def test_roles_that_the_template_refuses() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    with pytest.raises(ModelError, match="roles must alternate"):
        Encoder(small(STRICT), Format()).encode(records([{"messages": turns}]))


@pytest.mark.parametrize("name", CHATS)
def test_no_answer_is_trained_beyond_its_length_or_less(name: str) -> None:
    """Many rows at once: every trained run decodes to one answer, nothing outside does."""
    tokenizer = CHATS[name]()
    encoder = Encoder(tokenizer, Format())
    rows = [
        {"prompt": f"{TEXTS[k % 3]} {k}", "completion": " ".join(TEXTS[(k + 1) % 3].split()[: k % 7 + 1])}
        for k in range(40)
    ]
    rows = [r for r in rows if "<|" not in r["prompt"] + r["completion"]]
    examples = encoder.encode(records(rows))
    for row, example in zip(rows, examples, strict=True):
        (trained,) = runs(example)
        assert text(tokenizer, trained[:-1]).strip() == row["completion"]
        tree = tree_of(example)
        assert tree.ids[tree.tgt].tolist() == trained and (tree.weight == 1).all()
        assert tree.origin == example.where


def test_a_text_carried_along_beside_prompt_and_answer_is_not_what_is_trained_on() -> None:
    """`keep: [text]` in a data stage: the columns of the pair say what the row is."""
    pair = {"prompt": "ab", "completion": "cd"}
    encoder = Encoder(small(), Format(chat="plain"))
    (alone,), (beside,) = (encoder.encode([Record(row, "r:1")]) for row in (pair, pair | {"text": "the whole article"}))
    assert beside == alone and 0 < alone.trained.count(True) < len(alone.ids)
    assert encoder.reference_text(pair | {"text": "x"}) == "cd"
    assert encoder.prompts([Record(pair | {"text": "x"}, "r:1")]) == encoder.prompts([Record(pair, "r:1")])


def test_texts_that_a_tokenizer_cannot_write_are_told() -> None:
    """T5's pieces hold no Cyrillic: each word is one token that stands for anything. Byte-level pieces know all."""
    russian = [Record({"prompt": "Назови столицу страны.", "completion": "Это Москва."}, "a:1")]
    english = [
        Record(
            {
                "prompt": "Name the capital of France, which lies on a river, and say since when.",
                "completion": "Paris, of Île-de-France.",
            },
            "a:1",
        )
    ]
    for name, rows in (("t5", russian), ("gpt2", russian), ("t5", english)):
        encoder = Encoder(real(name), Format(chat="plain"), apart=name == "t5")
        encoder.encode(rows)
        if (name, rows) == ("t5", russian):
            with pytest.raises(ModelError, match=r"cannot write these texts: \d+% of their tokens are <unk>"):
                encoder.unknown.told()
        else:
            assert encoder.unknown.told() is None


def test_a_few_unknown_characters_are_counted() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({"<?>": 0, "</s>": 1, "a": 2, "b": 3}, "<?>"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<?>", eos_token="</s>")
    encoder = Encoder(tokenizer, Format(chat="plain"))
    encoder.encode([Record({"prompt": "a b a b a", "completion": "b a b ż"}, "r:1")])
    assert "1 of 9 tokens" in (encoder.unknown.told() or "")
