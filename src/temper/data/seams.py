"""Texts → token ids, and how far a text's tokens are those of its beginning alone: where an answer's tokens begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from temper.errors import ModelError

UNWRITABLE = 0.2  # share of unknown tokens at which a run stops


class Unknown:
    """Counts the tokens that stand for whatever a tokenizer does not know."""

    def __init__(self, tokenizer: Any) -> None:
        self.token, mark = tokenizer.unk_token, tokenizer.unk_token_id
        # GPT-2 calls its end token so too
        self.id = None if mark in (tokenizer.eos_token_id, tokenizer.bos_token_id) else mark
        self.met, self.lost = 0, 0

    def count(self, ids: list[int]) -> None:
        if self.id is not None:
            self.met += len(ids)
            self.lost += ids.count(self.id)

    def told(self) -> str | None:
        """A warning where part of the texts so far is lost; None where all is well.

        Raises:
            ModelError: so much is lost that a model would read and write next to nothing of these texts.
        """
        share = self.lost / max(1, self.met)
        if share > UNWRITABLE:
            raise ModelError(
                f"the tokenizer cannot write these texts: {share:.0%} of their tokens are {self.token}, which stands for "
                "whatever it does not know",
                do="choose a model whose tokenizer knows the texts' script",
            )
        if not self.lost:
            return None
        return (
            f"{self.lost:,} of {self.met:,} tokens ({share:.2g}) are {self.token}: the tokenizer does not know some "
            "characters, and the model neither reads nor writes them"
        )


class Seams:
    """One tokenizer.

    Args:
        templated: the texts were written by a chat template, which writes the special tokens itself.
    """

    def __init__(self, tokenizer: Any, *, templated: bool) -> None:
        self.tokenizer, self.templated = tokenizer, templated
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # Those that are found in a text before anything else is done to it; a tokenizer in Python tells no places.
        known = tokenizer.added_tokens_decoder.items() if templated and tokenizer.is_fast else ()
        self.apart = {i for i, token in known if not token.normalized}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids; exactly one beginning-of-sequence token where the tokenizer has the habit."""
        return self._tidied(self._found(texts)["input_ids"]) if texts else []

    def shared(
        self, texts: list[str], beginnings: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Token ids of texts, and for each beginning of a text (tokens that both begin with, tokens of the beginning alone)."""
        if not texts:
            return [], []
        found = self._found(texts)
        raw = found["input_ids"]
        wholes = self._tidied(raw)
        places = [
            [
                (len(whole), "") if piece == text else self._parting(found, i, raw[i], whole, piece)
                for piece in beginnings[i]
            ]
            for i, (text, whole) in enumerate(zip(texts, wholes, strict=True))
        ]
        tails = list({tail for row in places for _, tail in row if tail})
        ids = {"": [], **dict(zip(tails, self.ids(tails), strict=True))}
        return wholes, [
            [(at + _common(ids[tail], whole[at : at + len(ids[tail])]), at + len(ids[tail])) for at, tail in row]
            for whole, row in zip(wholes, places, strict=True)
        ]

    def _parting(self, found: Any, i: int, raw: list[int], whole: list[int], piece: str) -> tuple[int, str]:
        """(tokens of text i that its beginning `piece` has too, what of `piece` comes after them).

        A tokenizer first takes its added tokens out of a text, and tokenises what stands between two of them as if it
        stood alone. So up to the last added token within `piece` nothing depends on what follows. Chat templates end a
        prompt with one and the same few words after it; where there is none, all of `piece` is tokenised and compared.
        """
        if self.apart and piece and len(raw) == len(whole):
            at = found.char_to_token(i, len(piece) - 1)
            while at is not None and at >= 0:
                if raw[at] in self.apart:
                    first, last = found.token_to_chars(i, at)
                    if last <= len(piece):
                        return at, piece[first:]
                at -= 1
        return 0, piece

    def _found(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=not self.templated, return_attention_mask=False)

    def _tidied(self, lines: list[list[int]]) -> list[list[int]]:
        bos, eos = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        )  # looked up once: each look takes microseconds
        out = []
        for ids in lines:
            if not self.templated and ids and ids[-1] == eos and eos != bos:
                ids = ids[:-1]  # some append the end token themselves: it would stand between prompt and answer
            while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                ids = ids[1:]  # text that already begins with the token
            out.append(list(ids))
        return out


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    if a == b:
        return len(a)
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
