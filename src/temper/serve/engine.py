"""The thread that computes: requests come in at any time and are decoded together, token by token.

A `Lane` is a base with what can be decoded beside it in one pass. One thread serves all lanes in turn, since they share
the machine's cores anyway; what is said to it is said between two tokens.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from temper.engine import device as devices
from temper.errors import ModelError, TemperError
from temper.models import adapted
from temper.models.rowwise import Factors, Rowwise
from temper.models.scores import head_of
from temper.rollouts import fallback, native
from temper.rollouts.decoding import Draft
from temper.rollouts.sampler import Sampler

SCORED = 512  # positions whose logits are computed at a time
log = logging.getLogger("temper.serve")


class Work:
    """One prompt and the drafts of its answers. The engine writes them, and sets `news` whenever one has grown."""

    def __init__(self, ids: Sequence[int], drafts: list[Draft], adapter: str | None = None) -> None:
        self.ids, self.drafts, self.adapter = tuple(ids), drafts, adapter
        self.news = asyncio.Event()
        self.failed: Exception | None = None
        self.told = 0  # tokens that have been told
        self.begun = time.monotonic()
        self.first: float | None = None  # seconds until the first token

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.failed is not None or all(draft.over for draft in self.drafts)

    @property
    def written(self) -> int:
        """Tokens that were sampled so far."""
        return sum(len(draft.logps) for draft in self.drafts)

    def give_up(self) -> None:
        """Nobody waits for it any more; may be called from any thread."""
        for draft in self.drafts:
            draft.given_up = True


def _left() -> ModelError:
    """Of a request that was read before its adapter was taken away, and comes here after."""
    return ModelError("the adapter was unloaded meanwhile")


class Lane:
    """A model, with LoRA adapters for single rows where it decodes natively.

    Args:
        hf: a transformers model, or a PEFT model around one whose adapter then belongs to all rows.
        slots: answers decoded together.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, end_ids: Sequence[int], slots: int) -> None:
        self.hf, self.tokenizer, self.slots = hf.eval(), tokenizer, slots
        self.sampler = Sampler(hf, tokenizer, end_ids=end_ids, slots=slots)
        self.model = adapted.inner(hf)
        self.native = self.sampler.layout == "native"
        self.works: list[Work] = []
        self.leaving: set[str] = set()  # adapters to be taken away when none of their rows is left
        self.waiting: deque[Work] = deque()  # of a model that `generate` decodes
        self.closing = contextlib.ExitStack()
        self._open()

    def _open(self) -> None:
        if self.native:
            self.switch = self.closing.enter_context(native.opened(self.model, longest=native.LARGE))
            self.rowwise = Rowwise(self.model)
            self.closing.callback(self.rowwise.close)
            self.decoder = self._decoder()

    def renew(self, change: Callable[[], Any]) -> None:
        """Change the model's weights. Nothing may be under way, and adapters are gone."""
        self.closing.close()
        try:
            change()
        finally:
            self._open()

    def _decoder(self) -> native.Decoder:
        return native.Decoder(
            self.model, self.switch, slots=self.slots, places=2 * self.slots, adapters=self.rowwise, at_once=True
        )

    @property
    def reason(self) -> str:
        return self.sampler.reason

    def add(self, key: str, factors: Factors) -> None:
        """An adapter whose rows can be decoded with all others."""
        self.rowwise.add(key, factors)

    def remove(self, key: str) -> None:
        self.leaving.add(key)
        self._leave()

    def _leave(self) -> None:
        for key in self.leaving - {work.adapter for work in self.works}:
            self.rowwise.remove(key)
            self.leaving.discard(key)

    @property
    def busy(self) -> bool:
        # What was given up during a step leaves the works after it, and the decoder's slots in the next one.
        return bool(self.works) or (self.native and self.decoder.busy)

    def put(self, work: Work) -> None:
        self.works.append(work)
        if work.adapter is not None and work.adapter not in self.rowwise.factors:
            work.failed = _left()  # told at the next step
        elif self.native:
            self.decoder.put(work.ids, list(work.drafts), work.adapter)
        else:
            self.waiting.append(work)

    def step(self, told: Callable[[list[Work]], Any]) -> None:
        """One token for each row, or for a model that `generate` decodes all that waits, to its end."""
        try:
            if self.native:
                self.decoder.step()
            else:
                self._together(told)
        except Exception as error:  # whatever it is, it must reach those who wait, and the thread must go on
            failed = error if isinstance(error, TemperError) else ModelError(f"{type(error).__name__}: {error}")
            if not isinstance(error, TemperError):
                log.exception("a step failed")
            for work in self.works:
                work.failed = failed
            self.waiting.clear()
            if self.native:
                self.decoder = self._decoder()
        changed = [work for work in self.works if work.over or work.written > work.told]
        for work in changed:
            work.told = work.written
        told(changed)
        self.works = [work for work in self.works if not work.over]
        if self.leaving:
            self._leave()

    def _together(self, told: Callable[[list[Work]], Any]) -> None:
        taken: list[Work] = []
        while self.waiting and (not taken or sum(len(w.drafts) for w in taken) < self.slots):
            taken.append(self.waiting.popleft())
        asked = [(work.ids, draft) for work in taken for draft in work.drafts if not draft.given_up]
        for work in taken:
            for draft in work.drafts:
                draft.heard = lambda _, work=work: told([work])
        if asked:
            pad = self.tokenizer.pad_token_id
            fallback.decode(
                self.hf, [ids for ids, _ in asked], [draft for _, draft in asked], pad_id=0 if pad is None else pad,
                slots=self.slots, together=self.sampler.trust[0],
            )  # fmt: skip

    def scores(self, ids: Sequence[int], adapter: str | None, top: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """For each token but the first its log-probability after those before it, and the likeliest in its place.

        Raises:
            ModelError: an encoder–decoder, which has no text of which the prompt is a part.
        """
        if self.model.config.is_encoder_decoder or adapted.virtual(self.hf):
            raise ModelError("this model cannot score its prompt", do="leave echo out")
        if adapter is not None and adapter not in self.rowwise.factors:
            raise _left()
        if self.native:
            self.rowwise([adapter])
            self.switch(False)
        try:
            backbone, head = head_of(self.model)
            line = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
            hidden = backbone(input_ids=line, use_cache=False).last_hidden_state[0]
            out: list[tuple[float, list[tuple[int, float]]]] = []
            for k in range(0, len(ids) - 1, SCORED):
                some = hidden[k : min(k + SCORED, len(ids) - 1)]
                logps = head(inputs_embeds=some[:, None], use_cache=False).logits[:, 0].float().log_softmax(-1)
                own = logps.gather(-1, line[0, k + 1 : k + 1 + len(some)][:, None])[:, 0].tolist()
                values, best = logps.topk(min(max(1, top), logps.shape[-1]), dim=-1)
                tops = [list(zip(b, v, strict=True))[:top] for b, v in zip(best.tolist(), values.tolist(), strict=True)]
                out += list(zip(own, tops, strict=True))
        finally:
            if self.native:
                self.switch(True)
        return out

    def close(self) -> None:
        self.closing.close()


class Engine:
    """Computes on one thread of its own. `start` it within the event loop to which its news go.

    Args:
        precision: float32, bf16 or fp16.
    """

    def __init__(self, *, device: str = "auto", precision: str = "float32", threads: int | None = None) -> None:
        self.wanted, self.precision, self.threads = device, precision, threads
        self.lanes: list[Lane] = []
        self.inbox: queue.SimpleQueue[tuple[Lane, Work] | Callable[[], Any] | None] = queue.SimpleQueue()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.device = torch.device("cpu")
        self.thread = threading.Thread(target=self._run, name="temper-engine", daemon=True)
        self.ready: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start(self) -> None:
        """Begin computing.

        Raises:
            RecipeError: a device that this machine lacks.
        """
        self.thread.start()
        self.ready.result()

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """News go to this loop from now on."""
        self.loop = loop

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        self.inbox.put(None)
        self.thread.join()

    def submit(self, lane: Lane, work: Work) -> None:
        self.inbox.put((lane, work))

    def call(self, do: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Do something on the computing thread, between two tokens of the others."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def done() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(do())
                except BaseException as error:
                    future.set_exception(error)

        self.inbox.put(done)
        return future

    def _run(self) -> None:
        try:
            self.device = devices.setup(self.wanted, self.threads, halves=self.precision == "bf16")
            self.precision = devices.precision(self.precision, self.device)  # type: ignore[arg-type]
        except TemperError as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        with torch.no_grad(), devices.autocast(self.device, self.precision):
            while self._heard():
                for lane in [lane for lane in self.lanes if lane.busy]:
                    lane.step(self._tell)
        for lane in self.lanes:
            for work in lane.works:
                work.failed = ModelError("the server is being stopped")
            self._tell(lane.works)
            lane.close()

    def _heard(self) -> bool:
        """Take in what was said, waiting for something where there is nothing to compute; False at the end."""
        wait = not any(lane.busy for lane in self.lanes)
        while True:
            try:
                said = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if said is None:
                return False
            if isinstance(said, tuple):
                said[0].put(said[1])
            else:
                said()
                wait = not any(lane.busy for lane in self.lanes)

    def _tell(self, works: list[Work]) -> None:
        now = time.monotonic()
        for work in works:
            if work.first is None and work.written:
                work.first = now - work.begun
        if works and self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(_wake, works)


def _wake(works: list[Work]) -> None:
    for work in works:
        work.news.set()
