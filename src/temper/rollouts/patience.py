"""Requests to a model's server, with bounded concurrency and with patience.

What may pass by itself (429, 5xx, time-outs, broken connections, answers that are none) is asked again after a pause
that doubles, drawn anew so that many askers do not come back at once; what will not (401, 403, 404, …) is told at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx2

from temper.errors import ModelError

KEYS = ("TEMPER_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set
AGAIN = {408, 409, 425, 429}  # and all of 5xx
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server itself asks for more
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
LONGEST_CONNECTING = 20.0  # seconds until somebody takes the call
SHOWN = 300  # characters of a server's words in an error

Body = TypeVar("Body")
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Something to be asked again: its kind, what the server said, and for how many seconds it asks to be left alone."""

    kind: str
    said: str
    wait: float | None = None


class Line:
    """The line to a server. `troubles` counts by kind what had to be asked again.

    Args:
        where: the server, as errors name it.
        what: what it is to the user: «the endpoint».
        concurrency: requests under way at once.
        attempts: for one answer, the first included.
        pause: seconds before the second attempt; doubles from there.
        timeout: seconds without a word from the server; a long answer comes in one piece.
        tell: told once, when a second attempt has failed too, that it waits and goes on trying.
    """

    def __init__(
        self,
        where: str,
        *,
        what: str = "the endpoint",
        concurrency: int = 8,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 600.0,
        tell: Callable[[str], Any] | None = None,
    ) -> None:
        self.where, self.what, self.concurrency, self.attempts = where, what, concurrency, attempts
        self.pause, self.timeout = pause, timeout
        self.troubles: Counter[str] = Counter()
        self._tell = tell

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Within, requests can be made."""
        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, LONGEST_CONNECTING), pool=None)
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=self._headers(), timeout=timeout, limits=limits) as client:
            yield client

    async def each(
        self, bodies: Sequence[Body], one: Callable[[httpx2.AsyncClient, Body], Coroutine[Any, Any, Found]]
    ) -> list[Found]:
        """What `one` gives for every body, in their order; the first error ends the others."""
        gate = asyncio.Semaphore(self.concurrency)
        async with self.opened() as client:

            async def gated(body: Body) -> Found:
                async with gate:
                    return await one(client, body)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(gated(body)) for body in bodies]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def ask(
        self,
        client: httpx2.AsyncClient,
        url: str,
        body: Any,
        read: Callable[[httpx2.Response, bool], Found | Trouble],
        *,
        method: str = "POST",
    ) -> Found:
        """One answer.

        Args:
            body: becomes JSON; None: there is none.
            read: (a response, whether it is that of the last attempt) → the answer, or what is wrong with it.

        Raises:
            ModelError: there was none in all attempts.
        """
        trouble = Trouble("nothing", "")
        for attempt in range(self.attempts):
            try:
                response = await client.request(method, url, **({} if body is None else {"json": body}))
            except httpx2.TimeoutException:
                trouble = Trouble("no answer in time", f"nothing came within {self.timeout:g} s")
            except httpx2.TransportError as error:
                trouble = Trouble("broken connection", str(error) or type(error).__name__)
            except httpx2.RequestError as error:  # an encoding that cannot be undone, and the like
                trouble = Trouble("garbage", str(error) or type(error).__name__)
            else:
                found = read(response, attempt + 1 == self.attempts)
                if not isinstance(found, Trouble):
                    return found
                trouble = found
            self.troubles[trouble.kind] += 1
            if attempt == 1 and attempt + 1 < self.attempts:
                self._say_once(trouble)
            if attempt + 1 < self.attempts:
                await asyncio.sleep(self._pause(attempt, trouble))
        raise self.failed(
            f"{self.what} gave no answer in {self.attempts} attempts; the last time: {trouble.kind}",
            f"{_what_may_help(trouble.kind)} The same command goes on from here",
            trouble.said,
        )

    def refused(self, response: httpx2.Response) -> Trouble | None:
        """What a status other than 200 comes to: something to be asked again; None: it is 200.

        Raises:
            ModelError: a refusal that will not pass.
        """
        status = response.status_code
        if status in AGAIN or status >= 500:
            return Trouble(f"status {status}", response.text, _retry_after(response))
        if status != 200:
            raise self.failed(f"{self.what} refuses with status {status}", _what_to_do(status), response.text)
        return None

    def failed(self, what: str, do: str, said: str = "") -> ModelError:
        """An error that says what the server said, on one line, and never the key."""
        with_key, key = " ".join(_message(said).split()), _key()
        shown = with_key.replace(key, "…") if key else with_key
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
        return ModelError(f"{what}: {shown}" if shown else what, where=self.where, do=do)

    def _headers(self) -> dict[str, str]:
        key = _key()
        if not key.isascii() or not key.isprintable():
            raise self.failed("the key in the environment holds characters that no key has", "set it anew")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _say_once(self, trouble: Trouble) -> None:
        if self._tell is not None:
            said = f"{self.what} failed twice on one answer ({trouble.kind}); "
            self._tell(said + f"waiting, and trying up to {self.attempts} times before giving up")
            self._tell = None

    def _pause(self, attempt: int, trouble: Trouble) -> float:
        """Seconds until the next attempt: what the server asks for, else exponential with jitter."""
        if trouble.wait is None:
            return min(LONGEST_PAUSE, self.pause * 2**attempt) * random.uniform(0.5, 1.0)
        if trouble.wait > LONGEST_ASKED:
            raise self.failed(
                f"{self.what} asks to wait {trouble.wait:,.0f} s", "start again later; it goes on from here", trouble.said
            )
        return trouble.wait


def seed_of(seed: int, number: int, step: int) -> int:
    """What is sent as the seed of an answer. 31 bits: the largest range that all servers take."""
    digest = hashlib.sha256(f"{seed}/{number}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def wait_for(work: Coroutine[Any, Any, Found]) -> Found:
    """Run a coroutine to its end; in a notebook, where a loop runs already, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _key() -> str:
    return next((key for name in KEYS if (key := os.environ.get(name, "").strip())), "")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds, from a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (until.replace(tzinfo=until.tzinfo or datetime.UTC) - now).total_seconds())


def _message(said: str) -> str:
    """The sentence within an error as OpenAI's and vLLM's servers write it; else all of it."""
    try:
        found = json.loads(said)
        inner = found.get("error", found)
        return inner["message"] if isinstance(inner, dict) else str(inner)
    except (ValueError, KeyError, AttributeError):
        return said


def _what_may_help(kind: str) -> str:
    """What to do where something that may pass by itself did not."""
    if kind == "status 429":
        return "the server limits how much it is asked: lower concurrency, or wait."
    if kind.startswith("status 5"):
        return "the fault is the server's, not the recipe's: look at its log, or try later."
    if kind == "garbage":
        return "what came is no answer of this protocol: is it the base URL (often ending in /v1) of an OpenAI-compatible server?"
    if kind == "no answer in time":
        return "the server may be overloaded: lower concurrency, or decoding.max_new_tokens."
    return "is the server up, and the address its base URL (often ending in /v1)?"


def _what_to_do(status: int) -> str:
    if status in (401, 403):
        return "set the environment variable TEMPER_API_KEY (or OPENAI_API_KEY) to a key that may use this model"
    if status == 404:
        return "check the base URL (often ending in /v1) and the model's name behind the #"
    if status == 400:
        return "the prompt may be too long for the model, or the endpoint may not know one of the options in `decoding`"
    return "see what the server says"
