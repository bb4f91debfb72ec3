"""Requests of every shape that the server's own OpenAPI allows, and of shapes that it does not: never a fault of the server's,
and every error in OpenAI's envelope. TEMPER_FUZZ=N: so many examples of each test, other ones each time."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from serving import here
from temper.serve.app import application
from temper.serve.votes import Votes

EXAMPLES = int(os.environ.get("TEMPER_FUZZ", "0"))
MOST, CONTEXT, QUEUE = 20_000, 48, 24  # bytes of a body; tokens; answers
NAMES = ["base", "witty", "t5"]
FIELDS = {"message": str, "type": str, "param": (str, type(None)), "code": (str, type(None))}


def some(number: int) -> Any:
    return settings(
        max_examples=EXAMPLES or number, deadline=None, derandomize=not EXAMPLES, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Asker:
    """Asks the application in one event loop of its own. `statuses`: how often each came."""

    def __init__(self, app: Any, runner: asyncio.Runner) -> None:
        self.app, self.runner = app, runner
        self.statuses: Counter[int] = Counter()
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def __call__(self, method: str, path: str, **how: Any) -> httpx2.Response:
        found = self.runner.run(asyncio.wait_for(self.client.request(method, path, **how), 60))
        self.statuses[found.status_code] += 1
        assert found.status_code < 500, found.text
        if found.status_code >= 400 and method != "HEAD":
            error = found.json()["error"]
            assert set(found.json()) == {"error"} and set(error) == set(FIELDS), error
            assert all(isinstance(error[name], kind) for name, kind in FIELDS.items()) and error["message"], error
        return found

    def send(self, path: str, body: Any) -> httpx2.Response:
        """JSON as a careless client writes it: NaN and halves of characters included."""
        return self("POST", path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})


@pytest.fixture(scope="module")
def ask(served_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with here(served_models, ["base", "t5"], ("witty",), slots=8, queue=QUEUE) as at, asyncio.Runner() as runner:
        for served in at.gallery.served.values():
            served.context = CONTEXT  # no long answers
        at.engine.serve(runner.get_loop())
        app = application(at.desk, votes=Votes(tmp_path_factory.mktemp("votes") / "v.sqlite"), most=MOST)
        asker = Asker(app, runner)
        yield asker
        print(dict(asker.statuses))
        assert at.desk.under_way == 0


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_what_the_openapi_says(mode: GenerationMode, ask: Asker) -> None:
    schema = schemathesis.openapi.from_dict(ask.app.openapi())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= {o.path for o in operations}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to be wrong

        @some(40 if operation.body else 8)
        @given(case=operation.as_strategy(generation_mode=mode), name=st.sampled_from([*NAMES, None]))
        def one(case: Any, name: str | None) -> None:
            given = case.as_transport_kwargs(base_url="http://127.0.0.1")
            body = case.body
            if name is not None and isinstance(body, dict) and "model" in body:
                body["model"] = name
            if isinstance(body, dict | list):
                ask(given["method"], given["url"], params=given.get("params"), content=json.dumps(body).encode(), headers={"content-type": "application/json"})
            else:
                ask(given["method"], given["url"], params=given.get("params"))

        one()


half = st.sampled_from(["", "\ud83d", "a\ud83d", "\x00", "<|im_end|>", "😀", "\n" * 30])
texts = st.one_of(st.text(max_size=12), half, st.just("word " * 60), st.just("z" * 3000))
numbers = st.one_of(
    st.integers(-2, 40), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0.0, -0.0, 1e-45, 1e-320, 1e-30, 1e38, 2**63, 2**64 - 1, 1.0, True])
)  # fmt: skip
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)  # fmt: skip
tokens = st.lists(st.one_of(st.integers(0, 400), numbers), max_size=30)
few = st.text(min_size=1, max_size=5)
KNOWN: dict[str, Any] = {
    "n": st.integers(1, 3), "max_tokens": st.integers(1, 12), "stream": st.booleans(), "seed": st.integers(-(2**63), 2**64 - 1),
    "stop": st.one_of(few, st.lists(few, max_size=4)), "temperature": st.one_of(st.floats(0, 3), st.sampled_from([0, 1e-45, 1e-30, 100])),
    "top_p": st.floats(1e-9, 1), "top_k": st.integers(-1, 500), "min_p": st.floats(0, 1), "repetition_penalty": st.floats(1e-4, 1e4),
    "min_tokens": st.integers(0, 1), "user": few, "metadata": st.dictionaries(few, few, max_size=1),
}  # fmt: skip
OF_CHAT: dict[str, Any] = {**KNOWN, "logprobs": st.just(True)}
OF_TEXT: dict[str, Any] = {**KNOWN, "logprobs": st.integers(0, 20)}
ODD = ["model", "stream_options", "tools", "response_format", "suffix", "best_of", "top_logprobs", "max_completion_tokens", "echo", "odd\ud83d"]


def bodies(fields: dict[str, Any], what: dict[str, Any]) -> Any:
    """Mostly right; now and then a field of any value, or one that is not known."""
    right = st.fixed_dictionaries({"model": st.sampled_from(NAMES), **what}, optional=fields)
    odd = st.dictionaries(st.sampled_from([*fields, *what, *ODD]), st.one_of(junk, st.booleans(), st.integers(0, 5)), max_size=2)
    return st.tuples(right, st.one_of(st.just({}), odd)).map(lambda both: {**both[0], **both[1]})


message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "developer"]), "content": texts})
question = st.fixed_dictionaries({"role": st.just("user"), "content": few})


def check(found: httpx2.Response, body: dict[str, Any]) -> None:
    """What an answer must be whatever was asked."""
    if found.status_code != 200:
        return
    if body.get("stream"):
        assert found.text.endswith("data: [DONE]\n\n") and '"error"' not in found.text.splitlines()[-3], found.text
        return
    answer = found.json()
    prompts = len(body["prompt"]) if "prompt" in body and isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int) else 1
    assert [c["index"] for c in answer["choices"]] == list(range(prompts * (body.get("n") or 1)))
    assert all(c["finish_reason"] in ("stop", "length") for c in answer["choices"])


talks = st.one_of(question.map(lambda q: [q]), question.map(lambda q: [q]), st.lists(message, min_size=1, max_size=3))
ids = st.lists(st.integers(0, 90), min_size=1, max_size=20)
prompts = st.one_of(few, ids, st.lists(few, min_size=1, max_size=3), st.lists(ids, min_size=1, max_size=3), texts, tokens, st.lists(tokens, max_size=3))  # fmt: skip


@some(250)
@given(bodies(OF_CHAT, {"messages": talks}))
def test_conversations(ask: Asker, body: dict[str, Any]) -> None:
    check(ask.send("/v1/chat/completions", body), body)


@some(250)
@given(bodies(OF_TEXT, {"prompt": prompts}), st.sampled_from([{}, {}, {"echo": True, "stream": False}, {"echo": True, "max_tokens": 0, "stream": False, "min_tokens": 0}]))  # fmt: skip
def test_texts(ask: Asker, body: dict[str, Any], more: dict[str, Any]) -> None:
    check(ask.send("/v1/completions", {**body, **more}), {**body, **more})


paths = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models/%FF%00", "/v1/models/..%2f", "/nowhere", "/v1/", "/metrics"])  # fmt: skip
values = st.one_of(st.sampled_from(["", "http://[", "null", "²", "-1", "99999999999999999999999", "127.0.0.1", "[::1", "Bearer ", "\xff\xfe", "multipart/form-data; boundary=", "application/json; charset=\xe9"]), st.text(max_size=9))  # fmt: skip
headers = st.dictionaries(
    st.sampled_from(["host", "origin", "content-length", "content-type", "authorization", "sec-fetch-site", "accept", "cookie"]), values.map(lambda v: v.encode("utf-8", "replace")), max_size=3
).map(lambda found: [(name.encode("latin-1"), value) for name, value in found.items()])  # fmt: skip
LOAD = st.fixed_dictionaries({"lora_name": texts, "lora_path": st.one_of(texts, st.sampled_from(["..", "/", "../base", "dora", "foreign", "lines", "late/../../base", "~", "." * 5000]))})  # fmt: skip
raw = st.one_of(
    st.binary(max_size=40), st.just(b"[" * 9000), st.just(b"9" * 9000), st.just(b'{"a":' * 3000), st.just(b" " * (MOST + 1)), LOAD.map(lambda b: json.dumps(b).encode()),
    junk.map(lambda j: json.dumps(j).encode()),
)  # fmt: skip


@some(250)
@given(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]), paths, headers, raw, st.booleans())
def test_whatever_comes(ask: Asker, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, pieces: bool) -> None:
    async def chunks() -> Any:
        for k in range(0, len(body), 1000):
            yield body[k : k + 1000]

    found = ask(method, path, headers=headers, content=chunks() if pieces else body)
    if len(body) > MOST and found.status_code not in (403, 404, 405):
        assert found.status_code == 413 or method != "POST", found.text
