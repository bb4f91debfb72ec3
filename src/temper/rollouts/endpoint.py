"""Text from an OpenAI-compatible endpoint.

https://platform.openai.com/docs/api-reference, https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from temper.address import Address
from temper.errors import ModelError
from temper.rollouts.decoding import Decoding
from temper.rollouts.patience import Line, Trouble, seed_of, wait_for

ENDED = {"stop", "eos_token", "stop_sequence"}  # what servers call it when the model ended; OpenAI's is the first
EMPTY_ATTEMPTS = 2  # a model may have nothing to say: an empty answer is doubted once

Prompt = str | list[dict[str, str]]  # text to go on from, or a conversation to answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text, and whether the model ended it itself (not the limit on its length)."""

    text: str
    ended: bool


class Endpoint:
    """A model behind a URL.

    Args:
        how: concurrency, attempts, pause, timeout and tell, as of a `Line`.
    """

    def __init__(self, address: Address, **how: Any) -> None:
        self.address = address
        self.line = Line(str(address), **how)
        self._spoke = False  # it has given a text at least once

    @property
    def troubles(self) -> Counter[str]:
        """What had to be asked again, by kind."""
        return self.line.troubles

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
        bodies = [self._body(p, decoding, seed_of(seed, n, step)) for p, n in zip(prompts, named, strict=True)]

        async def one(client: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
            found = await self._one(client, body)
            if progress is not None:
                progress(1)
            return found

        answers = wait_for(self.line.each(bodies, one))
        self._spoke |= any(a.text for a in answers)
        if answers and not self._spoke:
            raise self.line.failed(
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

    async def _one(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
        empty = 0

        def read(response: httpx2.Response, last: bool) -> Answer | Trouble:
            nonlocal empty
            found = self._read(response)
            if isinstance(found, Trouble) or found.text or last:
                return found
            empty += 1
            return found if empty == EMPTY_ATTEMPTS else Trouble("empty", "", wait=0.0)

        path = "completions" if "prompt" in body else "chat/completions"
        return await self.line.ask(client, f"{self.address.url}/{path}", body, read)

    def _read(self, response: httpx2.Response) -> Answer | Trouble:
        """An answer, or what is to be asked again."""
        trouble, said = self.line.refused(response), response.text
        if trouble is not None:
            return trouble
        try:
            choice = response.json()["choices"][0]
            message = choice.get("message", choice)
            text, reason = message["content"] if "content" in message else message["text"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Trouble("garbage", said or "an empty body")
        if not isinstance(text, str | None):
            return Trouble("garbage", said)
        # Half a character, escaped alone (\ud83d), is legal JSON and can be written to no file.
        whole = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Answer(whole.strip(), reason in ENDED)
