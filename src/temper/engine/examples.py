"""Examples with their tokens' losses, as lines of worst.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from temper.engine.validation import Example

LONGEST = 1024  # tokens of an example that are kept
BEFORE = 64  # of these, tokens before the first that is scored
Pieces = Callable[[Sequence[int]], list[str]]  # token ids → the text of each


def pieces_of(tokenizer: Any) -> Pieces:
    """What each token adds to the text, such that the pieces together are the whole.

    A character may be spread over several tokens of bytes: it belongs to the last of them, and the others are empty.
    """

    def pieces(ids: Sequence[int]) -> list[str]:
        out, first, told = list[str](), 0, ""
        for k in range(len(ids)):
            text = tokenizer.decode(list(ids[first : k + 1]), clean_up_tokenization_spaces=False)
            whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
            out.append(text[len(told) :] if whole else "")
            if whole and k + 1 - first > 8:  # a window: decoding all of it for each token would cost the square
                first, told = k, tokenizer.decode([ids[k]], clean_up_tokenization_spaces=False)
            elif whole:
                told = text
        return out

    return pieces


def lines(examples: Sequence[Example], pieces: Pieces) -> list[dict[str, Any]]:
    """Examples as JSON: where each is from, its loss, and its tokens with theirs, branch after branch.

    Of a long one 1,024 tokens are kept, from 64 before the first that is scored; `left_out` says how many are not.
    """
    return [_line(rank, example, pieces) for rank, example in enumerate(examples, 1) if example.tokens is not None]


def _line(rank: int, example: Example, pieces: Pieces) -> dict[str, Any]:
    tree = example.tree
    assert example.tokens is not None
    losses = np.full(len(tree), np.nan)
    losses[tree.tgt] = example.tokens
    first = max(0, int(tree.tgt.min(initial=len(tree))) - BEFORE) if len(tree) > LONGEST else 0
    last = min(len(tree), first + LONGEST)
    # a branch begins where a token's subtree ends elsewhere than that of the token before it
    begins = [first, *(k for k in range(first + 1, last) if tree.end[k] != tree.end[k - 1]), last]
    parts = []
    for a, b in itertools.pairwise(begins):
        written = pieces(tree.ids[a:b].tolist())
        numbers = [None if np.isnan(x) else round(float(x), 4) for x in losses[a:b]]
        parts.append({"tokens": written, "losses": numbers})
    return {
        "rank": rank,
        "loss": round(example.loss, 6),
        "where": tree.origin,
        "parts": parts,
        "left_out": len(tree) - (last - first),
    }
