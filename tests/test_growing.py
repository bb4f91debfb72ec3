"""Texts that grow: told piece by piece they are what the tokenizer makes of all tokens, with no broken characters, and nothing
of a stop string is ever told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from temper.rollouts.decoding import Decoding, Draft
from temper.rollouts.growing import BROKEN, Growing
from test_chat import small
from test_written import SENTENCEPIECE, tokenizer

TEXTS = (
    "Привіт, 😀! Як справи?", "the cat  sat\n\non the mat", " leading and trailing ", "日本語と中文，混ざった文章。", "naïve façade ﷽ — «так»", "a\tb\u00a0c",
    "👨‍👩‍👧‍👦 family", "1 234,56 €",
)  # fmt: skip
NAMES = ["small", "gpt2", "qwen2", "llama2", "t5", SENTENCEPIECE]


def draft(tok: Any, ids: list[int], *stop: str, ends: frozenset[int] = frozenset()) -> tuple[list[str], Draft]:
    """Pieces as they are told, of tokens as a sampler gives them."""
    decoding = Decoding(max_new_tokens=max(1, len(ids)), stop=list(stop))
    pieces: list[str] = []
    growing = Growing(tok, stop)
    one = Draft(decoding, ends, tok, np.zeros(max(1, len(ids))), heard=lambda so_far: pieces.append(growing.more(so_far)))
    for token in ids:
        if one.add(token, 0.0, 0.0):
            break
    assert one.done is not None
    pieces.append(growing.end(one.done))
    assert "".join(pieces) == growing.whole(one.done)
    return pieces, one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_come_to_the_whole(name: str, text: str) -> None:
    tok = tokenizer(name)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    pieces, _ = draft(tok, ids)
    assert "".join(pieces) == tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert not any(BROKEN in piece for piece in pieces[:-1])
    assert len([p for p in pieces if p]) > 1 or len(ids) < 4 or tok.unk_token_id in ids


@pytest.mark.parametrize("name", NAMES)
def test_random_tokens_too(name: str) -> None:
    """Broken characters in the middle are told once it is sure that they are broken."""
    tok = tokenizer(name)
    draw = np.random.default_rng(0)
    for _ in range(40):
        ids = draw.integers(0, len(tok), 24).tolist()
        pieces, _ = draft(tok, ids)
        assert "".join(pieces) == tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_stop_string_is_told(name: str) -> None:
    tok = tokenizer(name)
    text = "one two STOP three"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    whole = tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for stop in ("STOP", "o ST", "P th"):
        pieces, one = draft(tok, ids, stop)
        assert one.done is not None
        if stop not in whole:  # an uncased tokenizer, or one that writes no capitals
            continue
        assert one.done.ended and "".join(pieces) == whole[: whole.index(stop)]


def test_what_only_looked_like_a_stop_string_is_told_at_the_end() -> None:
    tok = small()
    ids = tok("one two STO", add_special_tokens=False)["input_ids"]
    pieces, _ = draft(tok, ids, "STOP")
    assert "".join(pieces) == "one two STO" and "STO" in pieces[-1]


def test_special_tokens_are_no_text() -> None:
    tok = small()
    ids = tok("one", add_special_tokens=False)["input_ids"]
    special = tok.all_special_ids[0]
    pieces, _ = draft(tok, [*ids, special, *ids], "zzz")
    assert "".join(pieces) == "oneone"
    more = tok(" two STOP", add_special_tokens=False)["input_ids"]
    pieces, one = draft(tok, [*ids, special, *more], "STOP")
    assert one.done is not None and one.done.ended and "".join(pieces) == "one two "


def test_long_texts_cost_no_more_a_token() -> None:
    """Only the last tokens are decoded each time."""
    tok = small()
    longest = 0

    class Counting:
        def decode(self, ids: list[int], **how: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(ids))
            return tok.decode(ids, **how)

    ids = tok("word and word again " * 100, add_special_tokens=False)["input_ids"]
    growing, told = Growing(Counting()), ""
    for n in range(1, len(ids) + 1):
        told += growing.more(ids[:n])
    assert longest < 12 and told == tok.decode(ids)
