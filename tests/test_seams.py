"""How far a text's tokens are those of its beginning: found at the last added token, against tokenising both whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from temper.data.seams import Seams
from temper.stages.pretrain import Shape, train_tokenizer

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "tokenizers"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<turn>", "<turn>>"]  # one begins another


def byte_level() -> Any:
    made = train_tokenizer(["abc <turn> user assistant\n\n  x y 12 345"], Shape(vocabulary=330))
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def greedy_about_spaces() -> Any:
    """Added tokens that take the spaces beside them, or want to stand alone, or are looked for in normalised text."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "##b": 4, "user": 5}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", bos_token="<bos>")
    kinds = [
        AddedToken("<|im_start|>", lstrip=True, rstrip=True, normalized=False), AddedToken("<turn>", single_word=True, normalized=False),
        AddedToken("<turn>>", rstrip=True, normalized=False), AddedToken("ab", normalized=True),
    ]  # fmt: skip
    tokenizer.add_tokens(kinds)
    return tokenizer


def real(name: str) -> Any:
    if not (REAL / name).is_dir():
        pytest.skip("real tokenizers are not here")
    return (
        LlamaTokenizer.from_pretrained(REAL / name) if name == "llama2" else AutoTokenizer.from_pretrained(REAL / name)
    )


KINDS = {
    "byte level": byte_level,
    "greedy": greedy_about_spaces,
    "qwen2": lambda: real("qwen2"),
    "llama2": lambda: real("llama2"),
}
WORDS = [
    *SPECIAL,
    "<|im",
    "_start|>",
    "<tu",
    "rn>",
    "<bos>",
    "<s>",
    "a",
    "b",
    "ab",
    " ",
    "  ",
    "\n",
    "\n\n",
    "user",
    "ї",
    "🙂",
    "1",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).map("".join)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_text_shares_with_its_beginning(name: str) -> None:
    tokenizer = KINDS[name]()
    seams = Seams(tokenizer, templated=True)

    def naive(text: str, piece: str) -> tuple[int, int]:
        whole, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, piece))
        return next(
            (k for k, (x, y) in enumerate(zip(whole, alone, strict=False)) if x != y), min(len(whole), len(alone))
        ), len(alone)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
    @example(
        [("<|im_start|>a\n", "\nb"), ("a<turn>", ">b"), ("a<turn>", "b"), ("<|im_start|>", "  a"), ("<turn>\n", "a")]
    )
    def check(pairs: list[tuple[str, str]]) -> None:
        texts = [a + b for a, b in pairs]
        ids, shares = seams.shared(texts, [[a, a + b] for a, b in pairs])
        for (before, after), whole, (first, both) in zip(pairs, ids, shares, strict=True):
            if (bos := tokenizer.bos_token_id) is not None and whole[:1] == [bos]:
                continue  # several are made one: see test_chat
            text = before + after
            assert whole == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert first == naive(text, before) and both == (len(whole), len(whole))

    check()


def test_little_is_tokenised_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts end alike after their last added token: of a hundred rows that end is tokenised once."""
    seams = Seams(byte_level(), templated=True)
    asked: list[str] = []
    found = seams._found
    monkeypatch.setattr(seams, "_found", lambda texts: asked.extend(texts) or found(texts))
    befores = [f"<|im_start|>user\n{k}<|im_end|><|im_start|>assistant\n" for k in range(100)]
    texts = [f"{b}yes {k}<|im_end|>\n" for k, b in enumerate(befores)]
    _, shares = seams.shared(texts, [[b, t.rstrip("\n")] for b, t in zip(befores, texts, strict=True)])
    assert set(asked[100:]) == {"<|im_start|>assistant\n", "<|im_end|>"} and len(asked) == 102
    assert all(start == alone < stop == end for (start, alone), (stop, end) in shares)
