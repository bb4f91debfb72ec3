"""A vLLM server by plain HTTP: adapters come and go, token ids go in and come out with their log-probabilities.

Written for vLLM 0.33.0, of which it uses

    GET  /v1/models
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter    (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora)
    POST /collective_rpc of reload_weights, /reset_prefix_cache            (of whole models: VLLM_SERVER_DEV_MODE=1)
    POST /v1/completions with prompt as token ids, n, seed, logprobs, return_token_ids, stop_token_ids, ignore_eos

and `temper serve`, which speaks the same calls. Log-probabilities are those of the plain softmax, before temperature: vLLM's
default, `--logprobs-mode raw_logprobs`.
https://docs.vllm.ai/en/latest/features/lora.html, vllm/entrypoints/openai/completion/protocol.py
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import httpx2
import numpy as np

from temper.rollouts.decoding import Completion, Decoding, Draft
from temper.rollouts.patience import AGAIN, Line, Trouble, seed_of, wait_for

PASSING = AGAIN | {502, 503, 504}  # of a call that changes something; 500 is how vLLM refuses an adapter


@dataclasses.dataclass(frozen=True)
class Card:
    """A model that a server lists.

    `parent` is the base of an adapter, None of a base; `context` is how many tokens it takes, None where it does not say.
    """

    name: str
    parent: str | None
    context: int | None


class Vllm:
    """A server of a base model and adapters of it.

    Args:
        url: the base of the API, ending in /v1.
        concurrency: prompts under way at once.
        tell: told once that it waits and goes on trying.
    """

    def __init__(self, url: str, *, concurrency: int = 8, tell: Callable[[str], Any] | None = None) -> None:
        self.url = url
        self.line = Line(url, what="the engine", concurrency=concurrency, tell=tell)
        self.quick = Line(url, what="the engine", attempts=2, pause=0.5, timeout=10.0)  # what is told before anything is done

    def models(self) -> list[Card]:
        """All that is served.

        Raises:
            ModelError: nobody answers within seconds, or not as such a server does.
        """

        def read(response: httpx2.Response, last: bool) -> list[Card] | Trouble:
            if (trouble := self.quick.refused(response)) is not None:
                return trouble
            try:
                cards = [(c["id"], c.get("parent"), c.get("max_model_len")) for c in response.json()["data"]]
            except (ValueError, KeyError, TypeError, AttributeError):
                return Trouble("garbage", response.text or "an empty body")
            return [Card(str(n), p, c if isinstance(c, int) else None) for n, p, c in cards]

        return self._once(self.quick, "GET", f"{self.url}/models", None, read)

    def load(self, name: str, folder: str, *, rank: int) -> None:
        """Have an adapter served under a name.

        Args:
            folder: where the server finds it, in PEFT's format.
            rank: of the adapter; said where it is refused.

        Raises:
            ModelError: it is refused.
        """
        again = False

        def read(response: httpx2.Response, last: bool) -> bool | Trouble:
            nonlocal again
            status = response.status_code
            if status == 200 or (again and "already" in response.text):  # the answer to the first attempt was lost
                return True
            again = True
            if status in PASSING:
                return Trouble(f"status {status}", response.text)
            raise self.line.failed(
                f"the engine does not take the adapter {folder} (status {status})",
                f"it must see that folder; vLLM is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and "
                f"--max-lora-rank of {rank} or more, `temper serve` with --adapters-from",
                response.text,
            )

        self._once(self.line, "POST", f"{self.url}/load_lora_adapter", {"lora_name": name, "lora_path": folder}, read)

    def unload(self, name: str) -> bool:
        """Have an adapter served no more; whether the server did so. One that it does not know is gone already.

        Raises:
            ModelError: nobody answers.
        """

        def read(response: httpx2.Response, last: bool) -> bool | Trouble:
            status = response.status_code
            return Trouble(f"status {status}", response.text) if status in PASSING else status in (200, 404)

        return self._once(self.quick, "POST", f"{self.url}/unload_lora_adapter", {"lora_name": name}, read)

    def reload(self, folder: str) -> None:
        """Have the base's weights read anew, and what was computed with the former ones forgotten.

        Args:
            folder: where the server finds them, in transformers' format.

        Raises:
            ModelError: it is refused.
        """

        def read(response: httpx2.Response, last: bool) -> bool | Trouble:
            if response.status_code in PASSING:
                return Trouble(f"status {response.status_code}", response.text)
            if response.status_code != 200:
                raise self.line.failed(
                    f"the engine does not take the weights in {folder} (status {response.status_code})",
                    "it must see that folder; vLLM is started with VLLM_SERVER_DEV_MODE=1, `temper serve` with --reload and --adapters-from",
                    response.text,
                )
            return Trouble("busy", response.text) if '"success":false' in response.text.replace(" ", "") else True

        root = self.url.removesuffix("/v1")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._once(self.line, "POST", f"{root}/collective_rpc", body, read)
        self._once(self.line, "POST", f"{root}/reset_prefix_cache", None, read)

    def write(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ends: Collection[int],
        *,
        completions: int,
        seed: int,
        step: int,
        numbers: Sequence[int],
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[Completion]]:
        """`completions` answers to every prompt, in their order.

        The seed that is sent with a prompt is a function of (seed, step, its number); vLLM adds the completion's index to it.
        Of a completion `raw` is what the server says; `logps` is the same at temperature 1 and nan at any other.

        Args:
            ends: tokens that end a completion, whatever the server takes for such.
            numbers: one a prompt.

        Raises:
            ModelError: the server cannot be reached, does not know the model, or answers otherwise than it was asked.
        """
        bodies = [
            {
                "model": model, "prompt": list(prompt), "n": completions, "seed": seed_of(seed, number, step),
                "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature,
                # Said although they change nothing: what is left out vLLM takes from the model's generation_config.json.
                "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0,
                "logprobs": 0, "return_token_ids": True, "stop_token_ids": sorted(ends), "ignore_eos": True,
            }
            for prompt, number in zip(prompts, numbers, strict=True)
        ]  # fmt: skip

        async def one(client: httpx2.AsyncClient, body: dict[str, Any]) -> list[Completion]:
            found = await self.line.ask(client, f"{self.url}/completions", body, read)
            if progress is not None:
                progress(completions)
            return found

        def read(response: httpx2.Response, last: bool) -> list[Completion] | Trouble:
            return self._written(response, model, decoding, frozenset(ends), completions)

        return wait_for(self.line.each(bodies, one))

    def _written(
        self, response: httpx2.Response, model: str, decoding: Decoding, ends: frozenset[int], completions: int
    ) -> list[Completion] | Trouble:
        if response.status_code == 404:
            raise self.line.failed(
                f"the engine does not know «{model}»",
                "was it started anew meanwhile? the same command goes on from here",
                response.text,
            )
        if (trouble := self.line.refused(response)) is not None:
            return trouble
        try:
            choices = sorted(response.json()["choices"], key=lambda c: c["index"])
            parts = [(c.get("token_ids"), c["logprobs"]["token_logprobs"]) for c in choices]
        except (ValueError, KeyError, TypeError, AttributeError):
            return Trouble("garbage", response.text or "an empty body")
        if any(ids is None for ids, _ in parts):
            raise self.line.failed(
                "the engine gives no token ids (return_token_ids)", "take vLLM 0.33.0, for which this was written, or `temper serve`"
            )
        done = [replayed(ids, logps, decoding, ends) for ids, logps in parts]
        found = [c for c in done if c is not None]
        if len(found) != completions:
            raise self.line.failed(
                "the engine gave other completions than it was asked for: "
                + (f"{len(done)} instead of {completions}" if len(done) != completions else "one ends neither at an end token nor at the limit"),
                "take vLLM 0.33.0, for which this was written, or `temper serve`",
            )
        return found

    def _once(self, line: Line, method: str, url: str, body: Any, read: Callable[..., Any]) -> Any:
        async def asked() -> Any:
            async with line.opened() as client:
                return await line.ask(client, url, body, read, method=method)

        return wait_for(asked())


def replayed(
    ids: Sequence[int], logps: Sequence[float | None], decoding: Decoding, ends: frozenset[int]
) -> Completion | None:
    """Tokens that somebody else sampled as a completion; None where it is none: it goes on behind an end token, or stops
    before its time.

    Args:
        ids: with the end token.
        logps: one a token, under the plain softmax.
    """
    draft = Draft(decoding, ends, None, np.zeros(0))
    if len(ids) != len(logps) or any(p is None or math.isnan(p) for p in logps):
        return None
    for place, (token, logp) in enumerate(zip(ids, logps, strict=True)):
        assert logp is not None
        if draft.add(token, logp if decoding.temperature == 1 else math.nan, logp):
            return draft.done if place + 1 == len(ids) else None
    return None
