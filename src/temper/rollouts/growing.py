"""The text of tokens while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from temper.rollouts.decoding import Completion

BROKEN = "\ufffd"  # the end of a text whose last character has not come whole


class Growing:
    """What can be told of a text that grows: an unfinished character waits for its rest, and what may be the beginning of
    a stop string waits for what follows.

    Args:
        stop: strings that end the text, and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.told = ""
        self.sure = ""  # told, and what waits because of a stop string
        self.start = self.read = 0  # a few tokens before the last ones that were read, and these

    def more(self, ids: Sequence[int]) -> str:
        """What is new of the text of all tokens so far.

        Only the last few tokens are decoded, behind those before them: the first token of a text may lose its space.
        """
        before = self._text(ids[self.start : self.read])
        after = self._text(ids[self.start :])
        if len(after) > len(before) and not after.endswith(BROKEN):
            self.sure += after[len(before) :]
            self.start, self.read = self.read, len(ids)
        ends = [at for string in self.stop if (at := self.sure.find(string)) >= 0]
        waiting = max((_overlap(self.sure, string) for string in self.stop), default=0)
        return self._tell(self.sure[: min(ends, default=len(self.sure) - waiting)])

    def end(self, done: Completion) -> str:
        """What is left to tell of a text that is finished."""
        return self._tell(self.whole(done))

    def whole(self, done: Completion) -> str:
        """All of a finished text, without special tokens."""
        text = self._text(done.ids)
        if done.text is None:
            return text
        kept = self.tokenizer.decode(done.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text + done.text[len(kept) :]  # the part of a token before a stop string

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of a text with which a string begins.

    >>> _overlap("so be it. En", "End"), _overlap("so be it", "End")
    (2, 0)
    """
    return next((n for n in range(min(len(text), len(string)), 0, -1) if text.endswith(string[:n])), 0)
