"""What is asked of a sampler, what it gives, and the bookkeeping of one completion while it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from temper.recipe import Config

# A stop string is looked for in the last tokens alone; a token gives at least one byte, and the first few of a window
# may decode otherwise than within the whole (a stripped space, half a character).
MARGIN = 8


class Decoding(Config):
    """How answers are decoded. Temperature 0 is greedy, or a search among several beams."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer in tokens.")
    min_new_tokens: int = Field(default=0, ge=0, description="Shortest answer in tokens: none ends itself before.")
    temperature: float = Field(default=0.0, ge=0, description="0: greedy; otherwise the softmax's temperature.")
    top_k: int | None = Field(default=None, ge=1, description="Sample from this many most likely tokens.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability."
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Sample from tokens at least this share as likely as the likeliest."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1: tokens already there become less likely."
    )
    beams: int = Field(
        default=1,
        ge=1,
        description="Answers kept while searching for the likeliest one; 1: no search. Needs temperature 0.",
    )
    length_penalty: float = Field(
        default=1.0, description="Of a search: an answer's log-probability is divided by its length to this power."
    )
    stop: list[str] = Field(
        default=[], description="Strings that end an answer; what stands before them is kept, they are not."
    )

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty stop string would end every answer before its first token")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Decoding:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        if self.beams > 1 and (self.temperature > 0 or self.stop):
            raise ValueError("a search by beams samples nothing (temperature: 0) and knows no stop strings")
        if self.beams == 1 and self.length_penalty != 1:
            raise ValueError("length_penalty belongs to a search: beams above 1")
        return self


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer, with the log-probability of every token that was sampled.

    `logps` and `raw` are float32 of length len(ids) + (end is not None): under the distribution really sampled from
    (after penalty, temperature, top-k, top-p, min-p; greedy decoding is certain, 0), and under the model's plain
    softmax; those of a search by beams are nan, for nothing was sampled. A stop string may begin inside a token; that token and those after it are left out, and `text` has the
    text up to the string exactly.
    """

    ids: list[int]  # without the end token
    ended: bool  # by an end token or a stop string, not by the limit
    end: int | None  # the end token that closed it; None if cut or stopped by a string
    logps: np.ndarray
    raw: np.ndarray
    text: str | None = None  # of an answer that a stop string ended
    tops: list[list[tuple[int, float]]] | None = None  # of each of these tokens: the likeliest in its place, if asked for

    @property
    def scored(self) -> list[int]:
        """The tokens that the model chose, its end token among them."""
        return self.ids if self.end is None else [*self.ids, self.end]


class Draft:
    """A completion while it is written.

    Args:
        noise: float64 [max_new_tokens] in [0, 1): one number for each token.
        heard: called with its tokens so far, whenever there is one more.
        top: how many of the likeliest tokens are noted in each place, with their log-probabilities.
    """

    def __init__(
        self,
        decoding: Decoding,
        ends: frozenset[int],
        tokenizer: Any,
        noise: np.ndarray,
        heard: Callable[[Sequence[int]], Any] | None = None,
        *,
        top: int = 0,
    ) -> None:
        self.decoding, self.ends, self.tokenizer, self.heard = decoding, ends, tokenizer, heard
        self.noise = noise
        self.top = top
        # Drafts that agree in these are drawn in one go.
        self.way = (decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p, decoding.repetition_penalty)
        self.ids: list[int] = []
        self.logps: list[float] = []
        self.raw: list[float] = []
        self.tops: list[list[tuple[int, float]]] = []
        self.done: Completion | None = None
        self.latest = -1  # the token that was sampled last
        self.given_up = False  # nobody waits for it any more
        self.window = max((len(s.encode()) for s in decoding.stop), default=0) + MARGIN

    @property
    def early(self) -> bool:
        """Whether it is too short to end."""
        return len(self.ids) < self.decoding.min_new_tokens and bool(self.ends)

    @property
    def over(self) -> bool:
        """Whether it gets no more tokens."""
        return self.done is not None or self.given_up

    @property
    def chance(self) -> float:
        """The noise of its next token."""
        return float(self.noise[len(self.logps)])

    def add(self, token: int, logp: float, raw: float) -> bool:
        """Take a sampled token; True when the completion is finished."""
        self.logps.append(logp)
        self.raw.append(raw)
        self.latest = token
        if token in self.ends:
            self._finish(len(self.ids), end=token)
            return True
        self.ids.append(token)
        if self.heard is not None:
            self.heard(self.ids)
        if self.decoding.stop and self._stopped():
            return True
        if len(self.ids) == self.decoding.max_new_tokens:
            self._finish(len(self.ids))
            return True
        return False

    def _finish(self, kept: int, *, end: int | None = None, text: str | None = None) -> None:
        n = kept + (end is not None)
        logps, raw = (np.array(values[:n], np.float32) for values in (self.logps, self.raw))
        tops = self.tops[:n] if self.top else None
        self.done = Completion(self.ids[:kept], end is not None or text is not None, end, logps, raw, text, tops)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _stopped(self) -> bool:
        tail = self._text(self.ids[-self.window :])
        if not any(s in tail for s in self.decoding.stop):
            return False
        whole = self._text(self.ids)
        places = [at for s in self.decoding.stop if (at := whole.find(s)) >= 0]
        if not places:
            return False
        text = whole[: min(places)]
        kept = next(n for n in range(len(self.ids), -1, -1) if text.startswith(self._text(self.ids[:n])))
        self._finish(kept, text=text)
        return True
