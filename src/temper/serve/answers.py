"""What is sent back: answers and pieces of them, as OpenAI's protocol has them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from temper.rollouts.decoding import Draft
from temper.rollouts.growing import BROKEN, Growing
from temper.serve.engine import Work
from temper.serve.gallery import Served
from temper.serve.protocol import ChatRequest, CompletionRequest

Tops = Sequence[tuple[int, float]]
DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it stands within a text: with its space, where it begins with one."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def reason_of(draft: Draft) -> str:
    """Why an answer ended."""
    return "stop" if draft.done is not None and draft.done.ended else "length"


def token_ids(prompt: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
    """Token ids as vLLM gives them where they are asked for."""
    return {"prompt_token_ids": list(prompt), "token_ids": list(answer)}


class Reply:
    """The answers to one prompt while they are written.

    Args:
        first: the number of the first of them among all answers of the request.
    """

    def __init__(self, served: Served, asked: ChatRequest | CompletionRequest, work: Work, first: int = 0) -> None:
        self.served, self.asked, self.work, self.first = served, asked, work, first
        self.tokenizer = served.encoder.tokenizer
        self.texts = [Growing(self.tokenizer, asked.strings) for _ in work.drafts]
        self.shown = [0] * len(work.drafts)  # tokens whose log-probabilities have been sent
        self.ended = [False] * len(work.drafts)
        self.places = [0] * len(work.drafts)  # characters before these tokens
        self.chat = isinstance(asked, ChatRequest)
        self.scored = bool(asked.logprobs) if self.chat else asked.logprobs is not None

    def pieces(self) -> list[dict[str, Any]]:
        """Choices with what is new since the last call."""
        out = []
        for k, (draft, text) in enumerate(zip(self.work.drafts, self.texts, strict=True)):
            if self.ended[k]:
                continue
            done = draft.done
            new = text.more(list(draft.ids)) if done is None else text.end(done)
            if not new and done is None:
                continue
            self.ended[k] = done is not None
            choice: dict[str, Any] = {"index": self.first + k}
            choice |= {"delta": {"content": new} if new else {}} if self.chat else {"text": new}
            choice["logprobs"] = self._scores(k, whole=False) if self.scored else None
            choice["finish_reason"] = reason_of(draft) if done is not None else None
            out.append(choice)
        return out

    def choices(self, prompt: str = "", before: dict[str, list[Any]] | None = None) -> list[dict[str, Any]]:
        """The finished answers.

        Args:
            prompt: text that is given back before each, with `before` its log-probabilities.
        """
        out = []
        for k, (draft, text) in enumerate(zip(self.work.drafts, self.texts, strict=True)):
            said = text.whole(draft.done) if draft.done is not None else ""
            scores: dict[str, Any] | None = None
            if self.scored:
                self.places[k] = len(prompt)
                scores = self._scores(k, whole=True)
                if before is not None:
                    scores = {name: [*before[name], *values] for name, values in scores.items()}
            choice: dict[str, Any] = {"index": self.first + k}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": said, "refusal": None}
            else:
                choice["text"] = prompt + said
            choice |= {"logprobs": scores, "finish_reason": reason_of(draft)}
            if isinstance(self.asked, CompletionRequest) and self.asked.return_token_ids and draft.done is not None:
                choice |= token_ids(self.work.ids, draft.done.scored)
            out.append(choice)
        return out

    def _scores(self, k: int, *, whole: bool) -> dict[str, Any]:
        """Log-probabilities under the model's plain softmax, of tokens that have not been sent. Those of a text hold its end
        token too, as OpenAI's and vLLM's do: who asked for one token finds one (lm-eval cuts it off behind an echo)."""
        draft = self.work.drafts[k]
        done = draft.done
        ids = list(draft.ids) if done is None else done.ids if self.chat else done.scored
        first, self.shown[k] = (0 if whole else self.shown[k]), len(ids)
        ids = ids[first:]
        raw = draft.raw[first : first + len(ids)]
        tops = draft.tops[first : first + len(ids)] if self.asked.top else [()] * len(ids)
        if self.chat:
            return {"content": [self._told(i, p, t) for i, p, t in zip(ids, raw, tops, strict=True)], "refusal": None}
        found = listed(self.tokenizer, ids, raw, tops if self.asked.top else None, self.places[k])
        self.places[k] += sum(map(len, found["tokens"]))
        return found

    def _told(self, token: int, logp: float, tops: Tops) -> dict[str, Any]:
        return _one(self.tokenizer, token, logp) | {"top_logprobs": [_one(self.tokenizer, i, p) for i, p in tops]}


def _one(tokenizer: Any, token: int, logp: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": _finite(logp), "bytes": None if BROKEN in text else list(text.encode())}


def _finite(logp: float | None) -> float | None:
    """JSON knows no infinities; OpenAI writes −9999 for what is next to impossible."""
    return None if logp is None else max(logp, -9999.0)


def listed(
    tokenizer: Any, ids: Sequence[int], logps: Sequence[float | None], tops: Sequence[Tops] | None, place: int
) -> dict[str, list[Any]]:
    """Log-probabilities as completions have them.

    Args:
        tops: None where they were not asked for.
        place: characters before the first token.
    """
    texts = [token_text(tokenizer, i) for i in ids]
    places = []
    for text in texts:
        places.append(place)
        place += len(text)
    best: list[dict[str, float] | None] = []
    for k, found in enumerate(tops if tops is not None else [()] * len(ids)):
        named: dict[str, float] = {}
        for i, p in found:
            named.setdefault(token_text(tokenizer, i), max(p, -9999.0))  # several may look alike; the likeliest counts
        best.append(named if logps[k] is not None and tops is not None else None)
    return {
        "tokens": texts, "token_logprobs": [_finite(p) for p in logps], "top_logprobs": best, "text_offset": places,
    }  # fmt: skip


class Frame:
    """What all pieces of one response have in common."""

    def __init__(self, served: Served, asked: ChatRequest | CompletionRequest) -> None:
        chat = isinstance(asked, ChatRequest)
        self.kinds = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        self.same = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": served.name, "system_fingerprint": None,
        }  # fmt: skip

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self.same | {"object": self.kinds[0], "choices": choices, "usage": usage}

    def piece(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event(self.same | {"object": self.kinds[1], "choices": choices} | more)


def usage(works: Sequence[Work]) -> dict[str, Any]:
    """Tokens read and written, end tokens included."""
    read, written = sum(len(work.ids) for work in works), sum(work.written for work in works)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
