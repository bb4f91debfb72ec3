"""From a request to works, and from works to answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError

from temper.errors import TemperError
from temper.rollouts.decoding import Draft
from temper.rollouts.distribution import uniforms
from temper.serve import answers, refusals
from temper.serve.engine import Engine, Work
from temper.serve.gallery import Gallery, Served
from temper.serve.protocol import ChatRequest, CompletionRequest
from temper.serve.refusals import Refused
from temper.types import Record

UNLIMITED = 1024  # new tokens where neither the request nor the model sets a limit
LONGEST_NOISE = 1 << 17  # new tokens of one answer at most


class Desk:
    """Where requests are taken in.

    Args:
        queue: answers that may be under way or wait at once.
    """

    def __init__(self, engine: Engine, gallery: Gallery, *, queue: int = 256) -> None:
        self.engine, self.gallery, self.limit = engine, gallery, queue
        self.under_way = 0
        self.over: Callable[[Served, Sequence[Work], float, bool], Any] = lambda *_: None  # told of works, in `under`

    def served(self, name: str) -> Served:
        """
        Raises:
            Refused: no such model.
        """
        try:
            return self.gallery[name]
        except TemperError as error:
            raise refusals.told(error, 404, code="model_not_found", param="model") from None

    def prompts(self, served: Served, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Token ids of what is asked.

        Raises:
            Refused: it cannot be written out for this model, or a token is none of its own.
        """
        if isinstance(asked, ChatRequest):
            return [self._conversation(served, asked)]
        found = []
        size = int(served.lane.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        for prompt in asked.prompts:
            ids = list(prompt) if not isinstance(prompt, str) else self._text(served, prompt)
            if not ids:
                raise Refused(400, "the prompt is empty, and this model's tokenizer begins with nothing", param="prompt")
            if max(ids) >= size:
                raise Refused(400, f"token {max(ids)} is none of this model's: it knows {size}", param="prompt")
            found.append(ids)
        return found

    @staticmethod
    def _text(served: Served, text: str) -> list[int]:
        """A text as it is, with what the tokenizer puts before one."""
        encoder = served.encoder
        found = encoder.tokenizer(text)["input_ids"]
        ends = not encoder.apart and len(found) > 1 and found[-1] == encoder.tokenizer.eos_token_id
        return list(found[:-1] if ends else found)

    @staticmethod
    def _conversation(served: Served, asked: ChatRequest) -> list[int]:
        said = [message.plain for message in asked.messages]
        row: dict[str, Any] = {"messages": said}
        if not served.encoder.templated:
            if len(said) > 1:
                raise Refused(
                    400, f"«{served.name}» has no chat template, so it knows no conversations: send one message of the user, "
                    "or ask /v1/completions", param="messages",
                )  # fmt: skip
            row = {"prompt": said[0]["content"]}
        try:
            (ids,) = served.encoder.prompts([Record(row, "messages")])
        except TemperError as error:
            raise refusals.told(error, param="messages") from None
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Refused(400, f"the model's chat template refuses this conversation: {error}", param="messages") from None
        if not ids:
            raise Refused(400, "the conversation comes to no tokens", param="messages")
        return ids

    def works(self, served: Served, asked: ChatRequest | CompletionRequest) -> list[Work]:
        """What is to be written.

        Raises:
            Refused: a prompt or its answer is longer than the context; settings contradict one another.
        """
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        wanted = (asked.n or 1) * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if wanted > self.limit:  # waiting would not help
            raise Refused(
                400, f"that is {wanted} answers, and {self.limit} may be under way at once: ask for fewer of them",
                param="n" if (asked.n or 1) > 1 else "prompt",
            )  # fmt: skip
        works = []
        ends = asked.ends(served.ends) if isinstance(asked, CompletionRequest) else served.ends
        for number, ids in enumerate(self.prompts(served, asked)):
            decoding = self._decoding(served, asked, len(ids))
            drafts = [
                Draft(decoding, ends, served.encoder.tokenizer, uniforms(decoding.max_new_tokens, seed, 0, number, k), top=asked.top)
                for k in range(asked.n or 1)
            ]  # fmt: skip
            works.append(Work(ids, drafts, served.key))
        return works

    @staticmethod
    def _decoding(served: Served, asked: ChatRequest | CompletionRequest, prompt: int) -> Any:
        room, wanted = served.room(prompt), asked.wanted
        chat = isinstance(asked, ChatRequest)
        if room is not None and room < 1:
            raise Refused(
                400, f"the prompt has {prompt} tokens, and «{served.name}» takes {served.context} together with the answer: "
                "send less of it", code="context_length_exceeded", param="messages" if chat else "prompt",
            )  # fmt: skip
        if wanted is not None and wanted > (LONGEST_NOISE if room is None else room):
            field = "max_tokens" if asked.max_tokens is not None or not chat else "max_completion_tokens"
            raise Refused(
                400, f"{field} {wanted} is more than there is room for: the prompt has {prompt} tokens, and «{served.name}» "
                f"takes {served.context or LONGEST_NOISE} with the answer. Ask for {room or LONGEST_NOISE} at most, or send less",
                code="context_length_exceeded", param=field,
            )  # fmt: skip
        if wanted is None:
            wanted = UNLIMITED if room is None else min(room, LONGEST_NOISE)
        if (asked.min_tokens or 0) > max(1, wanted):
            raise Refused(400, f"min_tokens {asked.min_tokens} is above max_tokens {wanted}", param="min_tokens")
        try:
            return asked.decoding(max(1, wanted))
        except ValidationError as error:
            raise refusals.of_fields(list(error.errors())) from None

    @contextlib.contextmanager
    def under(self, served: Served, works: Sequence[Work], *, written: bool = True) -> Iterator[None]:
        """Within, works are written; at the end nobody waits for them any more.

        Args:
            written: False: they only count, for their prompts are to be scored and nothing is to follow.

        Raises:
            Refused: too much is under way.
        """
        answers = sum(len(work.drafts) for work in works)
        if self.under_way + answers > self.limit:
            raise Refused(
                429, f"{self.under_way} answers are under way, and {self.limit} may be: try again in a moment",
                code="queue_full", headers={"Retry-After": "1"},
            )  # fmt: skip
        self.under_way += answers
        begun = time.monotonic()
        try:
            for work in works if written else ():
                self.engine.submit(served.lane, work)
            yield
        finally:
            self.under_way -= answers
            for work in works:
                work.give_up()
            self.over(served, works, time.monotonic() - begun, written)

    async def whole(self, served: Served, asked: ChatRequest | CompletionRequest, works: list[Work]) -> dict[str, Any]:
        """A response in one piece."""
        frame = answers.Frame(served, asked)
        if isinstance(asked, CompletionRequest) and asked.echo:
            return await self._echoed(served, asked, works, frame)
        with self.under(served, works):
            for work in works:
                await ended(work)
        n = asked.n or 1
        choices = [c for k, work in enumerate(works) for c in answers.Reply(served, asked, work, k * n).choices()]
        return frame.whole(choices, answers.usage(works))

    async def _echoed(
        self, served: Served, asked: CompletionRequest, works: list[Work], frame: answers.Frame
    ) -> dict[str, Any]:
        """Prompts with their log-probabilities, and what follows them."""
        tokenizer, choices = served.encoder.tokenizer, []
        written = asked.max_tokens != 0
        with self.under(served, works, written=written):
            for k, work in enumerate(works):
                before = None
                text = tokenizer.decode(work.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                if asked.logprobs is not None:
                    before = await self._scored(served, asked, work)
                    text = "".join(before["tokens"])
                if written:
                    await ended(work)
                    choices += answers.Reply(served, asked, work, k * len(work.drafts)).choices(text, before)
                else:
                    shown = answers.token_ids(work.ids, ()) if asked.return_token_ids else {}
                    choices += [
                        {"index": k * len(work.drafts) + i, "text": text, "logprobs": before, "finish_reason": "length"} | shown
                        for i in range(len(work.drafts))
                    ]
        return frame.whole(choices, answers.usage(works))

    async def _scored(self, served: Served, asked: CompletionRequest, work: Work) -> dict[str, list[Any]]:
        lane, key = served.lane, served.key
        try:
            found = await asyncio.wrap_future(self.engine.call(lambda: lane.scores(work.ids, key, asked.top)))
        except TemperError as error:
            raise refusals.told(error, param="echo") from None
        logps, tops = [None, *(p for p, _ in found)], [(), *(t for _, t in found)]
        return answers.listed(served.encoder.tokenizer, work.ids, logps, tops if asked.top else None, 0)

    async def stream(self, served: Served, asked: ChatRequest | CompletionRequest, works: list[Work]) -> AsyncIterator[str]:
        """A response in pieces, as server-sent events."""
        frame, n = answers.Frame(served, asked), asked.n or 1
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if counted else {}
        replies = [answers.Reply(served, asked, work, k * n) for k, work in enumerate(works)]
        with self.under(served, works):
            if isinstance(asked, ChatRequest):
                begun = [{"index": k, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None} for k in range(n)]
                yield frame.piece(begun, **more)
            async for reply in _changed(replies):
                if reply.work.failed is not None:
                    failed = _failed(reply.work.failed)
                    yield answers.event(refusals.envelope(failed.status, failed.message, failed.code))
                    return
                if pieces := reply.pieces():
                    yield "".join(frame.piece([piece], **more) for piece in pieces)
            if counted:
                yield frame.piece([], usage=answers.usage(works))
            yield answers.DONE


async def _changed(replies: list[answers.Reply]) -> AsyncIterator[answers.Reply]:
    """Replies whose work has grown, until all are over."""
    if len(replies) == 1:
        (reply,) = replies
        while True:
            await reply.work.news.wait()
            reply.work.news.clear()
            over = reply.work.over
            yield reply
            if over:
                return
    waiting = {asyncio.ensure_future(reply.work.news.wait()): reply for reply in replies}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                reply = waiting.pop(task)
                reply.work.news.clear()
                if not reply.work.over:
                    waiting[asyncio.ensure_future(reply.work.news.wait())] = reply
                yield reply
    finally:
        for task in waiting:
            task.cancel()


async def ended(work: Work) -> None:
    """Wait until a work is finished.

    Raises:
        Refused: it failed.
    """
    while not work.over:
        await work.news.wait()
        work.news.clear()
    if work.failed is not None:
        raise _failed(work.failed)


def _failed(error: Exception) -> Refused:
    what = error.what if isinstance(error, TemperError) else "the model failed"
    return Refused(500, what, code="model_failed")
