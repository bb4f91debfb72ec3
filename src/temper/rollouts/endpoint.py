"""Text from an OpenAI-compatible endpoint, asked with bounded concurrency and with patience.

What may pass by itself (429, 5xx, time-outs, broken connections, answers that are none) is asked again after a pause
that doubles, drawn anew so that many askers do not come back at once; what will not (401, 403, 404, …) is told at once.
https://platform.openai.com/docs/api-reference, https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import datetime
import email.utils
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx2

from temper.address import Address
from temper.errors import ModelError
from temper.rollouts.decoding import Decoding

KEYS = ("TEMPER_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set
AGAIN = {408, 409, 425, 429}  # and all of 5xx
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server itself asks for more
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
ENDED = {"stop", "eos_token", "stop_sequence"}  # what servers call it when the model ended; OpenAI's is the first
EMPTY_ATTEMPTS = 2  # a model may have nothing to say: an empty answer is doubted once
SHOWN = 300  # characters of a server's words in an error

Prompt = str | list[dict[str, str]]  # text to go on from, or a conversation to answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text, and whether the model ended it itself (not the limit on its length)."""

    text: str
    ended: bool


class Endpoint:
    """A model behind a URL. `troubles` counts by kind what had to be asked again.

    Args:
        concurrency: requests under way at once.
        attempts: for one answer, the first included.
        pause: seconds before the second attempt; doubles from there.
        timeout: seconds without a word from the server; a long answer comes in one piece.
        tell: told once, when a second attempt has failed too, that it waits and goes on trying.
    """

    def __init__(
        self,
        address: Address,
        *,
        concurrency: int = 8,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 600.0,
        tell: Callable[[str], Any] | None = None,
    ) -> None:
        self.address, self.concurrency, self.attempts = address, concurrency, attempts
        self.pause, self.timeout = pause, timeout
        self.troubles: Counter[str] = Counter()
        self._tell = tell
        self._spoke = False  # it has given a text at least once

    def answer(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        seed: int = 0,
        step: int = 0,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Answer]:
        """One answer to every prompt, in their order. The seed sent with each is a function of (seed, number, step).

        A service may ignore the seed: only what was kept on disk is sure to come again.

        Args:
            numbers: one a prompt; by default its index.
            progress: called with a number of newly finished answers.

        Raises:
            ModelError: the endpoint cannot be reached, refuses, or gives no answers; says what it said.
        """
        if decoding.beams > 1:
            raise ModelError("an endpoint samples, and does not search by beams", do="leave beams out")
        named = range(len(prompts)) if numbers is None else numbers
        bodies = [self._body(p, decoding, _seed(seed, n, step)) for p, n in zip(prompts, named, strict=True)]
        answers = _wait_for(self._all(bodies, progress))
        self._spoke |= any(a.text for a in answers)
        if answers and not self._spoke:
            raise self._failed(
                "every answer of the endpoint is empty",
                "a model that thinks before it answers may have spent decoding.max_new_tokens on that: raise it"
                if not any(a.ended for a in answers)
                else "look at the model's chat template, or name another model",
            )
        return answers

    def _body(self, prompt: Prompt, decoding: Decoding, seed: int) -> dict[str, Any]:
        """What differs from the defaults is sent under vLLM's names; services that know fewer then need not know them."""
        asked = decoding.model_dump(exclude_defaults=True)
        asked |= {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
        asked.pop("max_new_tokens", None)
        if least := asked.pop("min_new_tokens", None):
            asked["min_tokens"] = least
        what = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        return {"model": self.address.model, **what, **asked, "seed": seed}

    async def _all(self, bodies: list[dict[str, Any]], progress: Callable[[int], Any] | None) -> list[Answer]:
        gate = asyncio.Semaphore(self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, 20.0), pool=None)
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=self._headers(), timeout=timeout, limits=limits) as client:

            async def one(body: dict[str, Any]) -> Answer:
                async with gate:
                    found = await self._one(client, body)
                if progress is not None:
                    progress(1)
                return found

            try:
                async with asyncio.TaskGroup() as group:  # the first error ends the others
                    tasks = [group.create_task(one(body)) for body in bodies]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _headers(self) -> dict[str, str]:
        key = _key()
        if not key.isascii() or not key.isprintable():
            raise self._failed("the key in the environment holds characters that no key has", "set it anew")
        return {"Authorization": f"Bearer {key}"} if key else {}

    async def _one(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
        url = f"{self.address.url}/{'completions' if 'prompt' in body else 'chat/completions'}"
        trouble, empty = _Trouble("nothing", ""), 0
        for attempt in range(self.attempts):
            try:
                response = await client.post(url, json=body)
            except httpx2.TimeoutException:
                trouble = _Trouble("no answer in time", f"nothing came within {self.timeout:g} s")
            except httpx2.TransportError as error:
                trouble = _Trouble("broken connection", str(error) or type(error).__name__)
            except httpx2.RequestError as error:  # an encoding that cannot be undone, and the like
                trouble = _Trouble("garbage", str(error) or type(error).__name__)
            else:
                found = self._read(response)
                if isinstance(found, Answer):
                    if found.text or empty + 1 == EMPTY_ATTEMPTS or attempt + 1 == self.attempts:
                        return found
                    empty += 1
                    self.troubles["empty"] += 1
                    continue
                trouble = found
            self.troubles[trouble.kind] += 1
            if attempt == 1 and attempt + 1 < self.attempts:
                self._say_once(trouble)
            if attempt + 1 < self.attempts:
                await asyncio.sleep(self._pause(attempt, trouble))
        raise self._failed(
            f"the endpoint gave no answer in {self.attempts} attempts; the last time: {trouble.kind}",
            f"{_what_may_help(trouble.kind)} The same command goes on from here",
            trouble.said,
        )

    def _say_once(self, trouble: _Trouble) -> None:
        if self._tell is not None:
            said = f"the endpoint failed twice on one answer ({trouble.kind}); "
            self._tell(said + f"waiting, and trying up to {self.attempts} times before giving up")
            self._tell = None

    def _pause(self, attempt: int, trouble: _Trouble) -> float:
        """Seconds until the next attempt: what the server asks for, else exponential with jitter."""
        if trouble.wait is None:
            return min(LONGEST_PAUSE, self.pause * 2**attempt) * random.uniform(0.5, 1.0)
        if trouble.wait > LONGEST_ASKED:
            raise self._failed(
                f"the endpoint asks to wait {trouble.wait:,.0f} s",
                "start again later; it goes on from here",
                trouble.said,
            )
        return trouble.wait

    def _read(self, response: httpx2.Response) -> Answer | _Trouble:
        """An answer, or what is to be asked again.

        Raises:
            ModelError: a refusal that will not pass.
        """
        said, status = response.text, response.status_code
        if status in AGAIN or status >= 500:
            return _Trouble(f"status {status}", said, _retry_after(response))
        if status != 200:
            raise self._failed(f"the endpoint refuses with status {status}", _what_to_do(status), said)
        try:
            choice = response.json()["choices"][0]
            message = choice.get("message", choice)
            text, reason = message["content"] if "content" in message else message["text"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return _Trouble("garbage", said or "an empty body")
        if not isinstance(text, str | None):
            return _Trouble("garbage", said)
        # Half a character, escaped alone (\ud83d), is legal JSON and can be written to no file.
        whole = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Answer(whole.strip(), reason in ENDED)

    def _failed(self, what: str, do: str, said: str = "") -> ModelError:
        """An error that says what the server said, on one line, and never the key."""
        with_key, key = " ".join(_message(said).split()), _key()
        shown = with_key.replace(key, "…") if key else with_key
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
        return ModelError(f"{what}: {shown}" if shown else what, where=str(self.address), do=do)


@dataclasses.dataclass(frozen=True)
class _Trouble:
    """Something to be asked again: its kind, what the server said, and for how many seconds it asks to be left alone."""

    kind: str
    said: str
    wait: float | None = None


def _key() -> str:
    return next((key for name in KEYS if (key := os.environ.get(name, "").strip())), "")


def _seed(seed: int, number: int, step: int) -> int:
    """31 bits: the largest range that all servers take."""
    digest = hashlib.sha256(f"{seed}/{number}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


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


def _wait_for(work: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """Run a coroutine to its end; in a notebook, where a loop runs already, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
