"""The server as a process of its own, asked as programs ask it: by the openai package, by plain HTTP, by Temper itself."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

import temper
import temper.serve
import test_generate
from serving import Server, server
from temper import hub
from temper.address import Address
from temper.cli import main
from temper.data.chat import Encoder
from temper.data.forms import Format
from temper.models import adapters, load
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Endpoint, _seed
from temper.rollouts.sampler import Sampler
from temper.types import Record

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
LONG = {"model": "base", "messages": HELLO, "max_tokens": 300, "min_tokens": 300, "seed": 1}


@pytest.fixture(scope="module")
def there(served_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    at = served_models
    votes = str(tmp_path_factory.mktemp("votes") / "votes.sqlite")
    with server(
        str(at / "base"), f"m={at / 'base'}", str(at / "judge"), "--adapter", f"witty={at / 'adapters/witty'}",
        "--adapters-from", str(at / "adapters"), "--votes", votes,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def ai(there: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=there.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def sampled(folder: Path, name: str, **how: Any) -> list[str]:
    """What the sampler writes to HELLO, as text."""
    own = () if name == "base" else (str(folder / "adapters" / name / "adapter"),)
    source = hub.Source(str(folder / "base"), None, own)
    hf, tokenizer = adapters.open_model(source)[0], load.tokenizer(source)
    encoder = Encoder(tokenizer, Format(), end_ids=load.end_ids(adapters.adapted.inner(hf)))
    n, seed = how.pop("n"), how.pop("seed")
    (done,) = Sampler(hf, tokenizer, end_ids=encoder.end_ids).sample(
        encoder.prompts([Record({"messages": HELLO}, "here")]), Decoding(**how), completions=n, seed=seed
    )
    return [tokenizer.decode(d.ids, skip_special_tokens=True) for d in done]


@pytest.mark.parametrize("name", ["base", "witty"])
def test_answers_are_the_samplers(name: str, ai: openai.OpenAI, served_models: Path) -> None:
    found = ai.chat.completions.create(model=name, messages=HELLO, n=3, seed=11, max_tokens=40, temperature=0.9, top_p=0.95)
    expected = sampled(served_models, name, n=3, seed=11, max_new_tokens=40, temperature=0.9, top_p=0.95)
    assert [c.message.content for c in found.choices] == expected and [c.index for c in found.choices] == [0, 1, 2]
    assert found.model == name and found.usage is not None and found.id.startswith("chatcmpl-")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = ai.chat.completions.create(model=name, messages=HELLO, n=3, seed=11, max_completion_tokens=40, temperature=0.9, top_p=0.95)
    assert again.choices == found.choices
    free = {ai.chat.completions.create(model=name, messages=HELLO, max_tokens=20).choices[0].message.content for _ in range(3)}
    assert len(free) == 3, "without a seed each answer is another"


def test_a_conversation_goes_on_with_the_answer_as_it_came(ai: openai.OpenAI) -> None:
    first = ai.chat.completions.create(model="base", messages=HELLO, seed=1, max_tokens=20).choices[0].message
    sent: list[Any] = [*HELLO, first, {"role": "user", "content": "And then?"}]
    written: list[Any] = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And then?"}]
    found = [ai.chat.completions.create(model="base", messages=m, seed=2, max_tokens=20).choices for m in (sent, written)]
    assert found[0] == found[1]


def test_how_an_answer_ends_and_what_it_counts(ai: openai.OpenAI) -> None:
    for seed in range(6):
        found = ai.chat.completions.create(model="base", messages=HELLO, seed=seed, max_tokens=25, logprobs=True)
        (choice,), usage = found.choices, found.usage
        assert choice.logprobs is not None and choice.logprobs.content is not None and usage is not None
        tokens = len(choice.logprobs.content)
        assert (choice.finish_reason, usage.completion_tokens) == (("length", 25) if tokens == 25 else ("stop", tokens + 1))
    whole = ai.chat.completions.create(model="base", messages=HELLO, seed=0, max_tokens=60).choices[0].message.content or ""
    stop = whole[7:9]
    cut = ai.chat.completions.create(model="base", messages=HELLO, seed=0, max_tokens=60, stop=[stop, "never this"]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == whole[: whole.index(stop)]


@pytest.mark.parametrize("stop", [None, "a"])
@pytest.mark.parametrize("n", [1, 3])
def test_pieces_come_to_the_whole(n: int, stop: str | None, ai: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "witty", "messages": HELLO, "n": n, "seed": 3, "max_tokens": 50, "stop": stop, "logprobs": True, "top_logprobs": 2}
    whole = ai.chat.completions.create(**how)
    pieces = list(ai.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert all(p.usage is None for p in pieces[:-1]) and len({p.id for p in pieces}) == 1
    for k, choice in enumerate(whole.choices):
        mine = [c for p in pieces for c in p.choices if c.index == k]
        assert mine[0].delta.role == "assistant" and "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [*[None] * (len(mine) - 1), choice.finish_reason]
        assert len(mine) > 3 or choice.finish_reason == "stop"
        assert choice.logprobs is not None and choice.logprobs.content is not None
        scores = [token for c in mine if c.logprobs for token in c.logprobs.content or []]
        assert [s.model_dump() for s in scores][: len(choice.logprobs.content)] == [s.model_dump() for s in choice.logprobs.content]
        assert all(len(s.top_logprobs) == 2 for s in scores)
        if choice.finish_reason == "length":
            spelt = b"".join(bytes(s.bytes) if s.bytes is not None else b"?" for s in choice.logprobs.content)
            assert b"?" in spelt or spelt.decode() == choice.message.content


def test_a_stream_on_the_wire(there: Server) -> None:
    with httpx2.stream("POST", f"{there.url}/completions", json={"model": "base", "prompt": "Hi", "stream": True, "seed": 1, "max_tokens": 9, "logprobs": 0}) as found:
        assert found.headers["content-type"].startswith("text/event-stream") and found.headers["cache-control"] == "no-store"
        lines = list(found.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""] and all(line == "" or line.startswith("data: ") for line in lines)
    events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    whole = there.post("/v1/completions", {"model": "base", "prompt": "Hi", "seed": 1, "max_tokens": 9, "logprobs": 0}).json()
    (choice,) = whole["choices"]
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for e in events for x in e["choices"][0]["logprobs"][name]] == choice["logprobs"][name]
    assert all(e["object"] == "text_completion" and "usage" not in e for e in events)


def test_texts_lists_and_tokens(ai: openai.OpenAI, served_models: Path) -> None:
    tokenizer = load.tokenizer(hub.Source(str(served_models / "base")))
    ids = tokenizer("Hello")["input_ids"]
    how: dict[str, Any] = {"model": "base", "seed": 2, "max_tokens": 12}
    alone = ai.completions.create(prompt="Hello", **how)
    assert alone.choices == ai.completions.create(prompt=ids, **how).choices
    assert ai.completions.create(model="base", prompt="Hello", seed=2, max_tokens=16).choices == ai.completions.create(model="base", prompt="Hello", seed=2).choices
    several = ai.completions.create(prompt=["Hello", "Other"], n=2, **how)
    listed = ai.completions.create(prompt=[ids, tokenizer("Other")["input_ids"]], n=2, **how)
    assert several.choices == listed.choices and [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == alone.choices[0].text and len({c.text for c in several.choices}) == 4
    echoed = ai.completions.create(prompt="Hello", echo=True, logprobs=2, **how).choices[0]
    assert echoed.logprobs is not None and echoed.logprobs.tokens is not None and echoed.logprobs.token_logprobs is not None
    assert echoed.text == "<bos>Hello" + alone.choices[0].text
    only = ai.completions.create(model="base", prompt="Hello", echo=True, logprobs=2, max_tokens=0).choices[0]
    assert only.text == "<bos>Hello" and only.logprobs is not None and only.logprobs.token_logprobs is not None
    assert only.logprobs.tokens == echoed.logprobs.tokens[: len(ids)] and only.logprobs.token_logprobs == echoed.logprobs.token_logprobs[: len(ids)]
    assert ai.completions.create(prompt="Hello", echo=True, **how).choices[0].text == echoed.text


def test_the_end_token_of_a_text_has_its_log_probability(ai: openai.OpenAI) -> None:
    """So one token asked for is always one token told, whichever it is."""
    found = ai.completions.create(model="base", prompt="Hello", n=120, max_tokens=1, logprobs=1, seed=0)
    assert all(c.logprobs is not None and len(c.logprobs.tokens or []) == 1 for c in found.choices)
    assert any(c.text == "" and c.finish_reason == "stop" for c in found.choices)


def test_models_are_listed(ai: openai.OpenAI, there: Server) -> None:
    cards = {m.id: m for m in ai.models.list()}
    assert list(cards) == ["base", "m", "judge", "witty"]
    one = ai.models.retrieve("witty")
    assert one == cards["witty"] and one.model_dump()["parent"] == "base" and one.model_dump()["max_model_len"] == 400
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nobody")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": HELLO, **fields}


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        (chat(model="bsae"), 404, "model", "there is no model «bsae» here; did you mean «base»?"),
        (chat(frequency_penalty=0.5), 400, "frequency_penalty", "«frequency_penalty» is not supported"),
        (chat(tools=[{"type": "function"}]), 400, "tools", "«tools» is not supported"),
        (chat(logit_bias={"1": 5}), 400, "logit_bias", "«logit_bias» is not supported"),
        (chat(colour="red"), 400, "colour", "«colour» is not supported, and would be ignored: leave it out"),
        (chat(temperature=-1), 400, "temperature", "«temperature»: input should be greater than or equal to 0"),
        (chat(messages=[]), 400, "messages", "«messages»"),
        ({"model": "base"}, 400, "messages", "«messages» is missing"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), 400, "messages", "'text'"),
        (chat(messages=[*HELLO, {"role": "assistant", "content": "x"}]), 400, "messages", "the last of the «messages» must be the user's"),
        (chat(messages=[{"role": "user", "content": "x" * 500}]), 400, "messages", "takes 400 together with the answer"),
        (chat(max_tokens=399), 400, "max_tokens", "Ask for"),
        (chat(max_completion_tokens=399), 400, "max_completion_tokens", "Ask for"),
        (chat(min_tokens=9, max_tokens=3), 400, "min_tokens", "min_tokens 9 is above max_tokens 3"),
        (chat(n=129), 400, "n", "less than or equal to 128"),
        (chat(stream_options={"include_usage": True}), 400, "stream_options", "belongs to a stream"),
        (chat(top_logprobs=2), 400, "top_logprobs", "set logprobs"),
        (chat(stop=""), 400, "stop", "an empty stop string"),
        ({"model": "base", "prompt": ["a"] * 3, "n": 100}, 400, "n", "that is 300 answers, and 256 may be under way"),
        ({"model": "base", "prompt": [999]}, 400, "prompt", "token 999 is none of this model's: it knows 334"),
        ({"model": "base", "prompt": "x", "echo": True, "stream": True}, 400, "echo", "«echo» cannot be streamed"),
    ],
)  # fmt: skip
def test_what_is_refused_is_told_by_name(body: dict[str, Any], status: int, param: str, said: str, there: Server) -> None:
    found = there.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", body)
    error = found.json()["error"]
    assert found.status_code == status and said in error["message"] and error["param"] == param, error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_the_client_raises_its_own_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model «nobody»") as error:
        ai.chat.completions.create(model="nobody", messages=HELLO)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as refused:
        ai.chat.completions.create(model="base", messages=HELLO, presence_penalty=1, stream=True)
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as long:
        ai.completions.create(model="base", prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"


def test_paths_methods_bodies_and_pages_of_others(there: Server) -> None:
    assert there.get("/health").json() == {"status": "ok"}
    for found, status, said in (
        (there.post("/v1/chat/completions", content=b"{no", headers={"content-type": "application/json"}), 400, "the body is no JSON"),
        (there.post("/v1/chat/completions", content=b""), 400, "the body"),
        (there.get("/v1/nothing"), 404, "there is nothing at /v1/nothing"),
        (there.get("/v1/chat/completions"), 405, "GET is not answered at /v1/chat/completions"),
        (there.get("/v1/models", headers={"Host": "evil.example"}), 403, "was asked as «evil.example»"),
        (there.get("/v1/models", headers={"Host": "localhost.evil.example:80"}), 403, "evil"),
        (there.get("/v1/models", headers={"Origin": "http://evil.example"}), 403, "pages of http://evil.example"),
        (there.get("/v1/models", headers={"Origin": "null"}), 403, "other sites"),
        (there.get("/v1/models", headers={"Origin": "http://[broken"}), 403, "broken"),
        (there.get("/health", headers={"Sec-Fetch-Site": "cross-site"}), 403, "other sites"),
        (there.get("/v1/models", headers={"Origin": there.address.replace("127.0.0.1", "localhost")}), 403, "localhost"),
    ):  # fmt: skip
        assert found.status_code == status and said in found.json()["error"]["message"], found.text
    port = urlsplit(there.address).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert there.get("/v1/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


def test_a_key_a_small_queue_and_small_bodies(served_models: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    with server(
        str(served_models / "base"), "--api-key-file", str(tmp_path / "key"), "--queue", "3", "--max-body", "2000", "--host", "0.0.0.0",
        "--votes", str(tmp_path / "votes.sqlite"),
    ) as made:  # fmt: skip
        made.address = made.address.replace("0.0.0.0", "127.0.0.1")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cret2"}, {"Authorization": b"Bearer \xff"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                found = made.get(path, headers=headers)
                assert found.status_code == 401 and found.json()["error"]["type"] == "authentication_error", (path, headers)
        assert made.get("/health").status_code == 200
        mine = {"Authorization": "Bearer s3cret"}
        assert made.get("/v1/models", headers={**mine, "Host": "model.example"}).status_code == 200
        too_long = json.dumps({"model": "base", "prompt": "x" * 2000}).encode()
        kind = {**mine, "content-type": "application/json"}
        for content in (too_long, iter([too_long[:1500], too_long[1500:]])):  # with its length, and in pieces
            found = made.post("/v1/completions", content=content, headers=kind)
            assert found.status_code == 413 and "2,000 bytes" in found.json()["error"]["message"], found.text
        with openai.OpenAI(base_url=made.url, api_key="wrong", max_retries=0) as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with openai.OpenAI(base_url=made.url, api_key="s3cret", max_retries=0) as client, concurrent.futures.ThreadPoolExecutor() as pool:
            body: dict[str, Any] = {"model": "base", "messages": HELLO, "max_tokens": 300, "extra_body": {"min_tokens": 300}}
            with client.chat.completions.create(**body, n=3, stream=True) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError, match="3 answers are under way, and 3 may be") as full:
                    client.chat.completions.create(**body)
                assert full.value.response.headers["retry-after"] == "1"
            waited = pool.submit(Endpoint(Address(made.url, "base"), pause=0.05).answer, [HELLO] * 4, Decoding(max_new_tokens=20))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TEMPER_API_KEY", "s3cret")
                answered = Endpoint(Address(made.url, "base"), pause=0.05).answer([HELLO] * 4, Decoding(max_new_tokens=20))
            assert len({a.text for a in answered}) == 1, "more are asked at once than may wait, and they come again"
            assert "401" in str(waited.exception())


def test_adapters_are_loaded_and_unloaded(there: Server, ai: openai.OpenAI, served_models: Path, tmp_path: Path) -> None:
    def load_(name: Any, path: Any) -> tuple[int, str]:
        found = there.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        return found.status_code, found.text if found.status_code == 200 else found.json()["error"]["message"]

    inside = served_models / "adapters"
    outside = tmp_path / "outside"
    outside.mkdir()
    for name, to in (("leaves", served_models / "base"), ("inner-leaves", None), ("stays", inside / "late")):
        (inside / name).unlink(missing_ok=True) if to is not None else None
        if to is not None:
            (inside / name).symlink_to(to)
    (inside / "inner-leaves").mkdir(exist_ok=True)
    (inside / "inner-leaves" / "adapter").unlink(missing_ok=True)
    (inside / "inner-leaves" / "adapter").symlink_to(served_models / "base")
    linked = inside / "file-leaves"
    linked.mkdir(exist_ok=True)
    for file in (inside / "late/adapter").iterdir():
        (linked / file.name).unlink(missing_ok=True)
        (linked / file.name).symlink_to(file)
    (outside / "adapter_config.json").write_text("{}")
    (linked / "adapter_config.json").unlink()
    (linked / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    missing = "there is no adapter"
    for path in ("../base", "late/../../base", "..", str(served_models / "base"), "/", "nowhere", "leaves", "inner-leaves", "late/\n", "~", "file-leaves"):
        status, said = load_("x", path)
        assert status == 404 and missing in said, (path, status, said)
    for path, status, part in (("foreign", 400, "trained on another base"), ("dora", 400, "--adapter NAME=PATH"), ("\0", 400, "no path"), (" ", 400, "no path")):
        assert load_("x", path)[0] == status and part in load_("x", path)[1], path
    for name, part in (("base", "there is a model «base» already"), ("witty", "already"), ("", "no name"), ("a\nb", "no name"), ("x" * 300, "no name")):
        assert load_(name, "late")[0] == 400 and part in load_(name, "late")[1], name
    expected = sampled(served_models, "late", n=1, seed=4, max_new_tokens=20, temperature=1)
    for path in ("late", str(inside / "late"), str(inside / "late/adapter"), "stays", "./dry/../late"):
        assert load_("fresh", path) == (200, "Success: LoRA adapter 'fresh' added successfully.")
        found = ai.chat.completions.create(model="fresh", messages=HELLO, seed=4, max_tokens=20)
        assert [found.choices[0].message.content] == expected
        assert "fresh" in [m.id for m in ai.models.list()]
        gone = there.post("/v1/unload_lora_adapter", {"lora_name": "fresh"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'fresh' removed successfully.")
        with pytest.raises(openai.NotFoundError):
            ai.chat.completions.create(model="fresh", messages=HELLO)
    for name, status in (("fresh", 404), ("witty", 400), ("base", 400)):
        assert there.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == status


def test_metrics_count(there: Server) -> None:
    assert there.idle()
    before = there.metrics()
    body = {"model": "witty", "prompt": ["Hello", "Hi"], "n": 2, "max_tokens": 7, "min_tokens": 7}
    found = there.post("/v1/completions", body).json()
    there.post("/v1/completions", {**body, "model": "nobody"})
    there.post("/v1/completions", {**body, "echo": True, "max_tokens": 0, "min_tokens": 0, "logprobs": 1})
    after = there.metrics()
    more = lambda *name: after.get(name, 0) - before.get(name, 0)  # noqa: E731
    assert more("temper_generation_tokens_total", "witty") == 28 == found["usage"]["completion_tokens"]
    assert more("temper_prompt_tokens_total", "witty") == 2 * found["usage"]["prompt_tokens"]
    assert more("temper_requests_total", "/v1/completions", "200") == 2 and more("temper_requests_total", "/v1/completions", "404") == 1
    assert more("temper_time_to_first_token_seconds_count", "witty") == 2 and more("temper_request_seconds_count", "witty") == 2
    assert more("temper_answers_given_up_total", "witty") == 0 and after[("temper_answers_under_way",)] == 0


def test_clients_that_hang_up(there: Server, ai: openai.OpenAI) -> None:
    assert there.idle()
    before = there.metrics()
    expected = ai.chat.completions.create(model="witty", messages=HELLO, seed=8, max_tokens=200)
    host, port = "127.0.0.1", urlsplit(there.address).port
    with concurrent.futures.ThreadPoolExecutor() as pool:
        kept = pool.submit(ai.chat.completions.create, model="witty", messages=HELLO, seed=8, max_tokens=200)
        for k in range(24):
            body = json.dumps({**LONG, "seed": k, "stream": k % 2 == 0}).encode()
            with socket.create_connection((host, port)) as raw:
                raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
                raw.sendall(body[: 20 if k % 8 == 3 else len(body)])  # some in the middle of what they say
                if k % 4 == 0:
                    raw.recv(100)
                elif k % 4 == 1:
                    time.sleep(0.02)
        assert kept.result().choices == expected.choices
    assert there.idle(), "nothing of theirs is left under way"
    name = ("temper_answers_given_up_total", "base")
    assert 10 < there.metrics()[name] - before.get(name, 0) <= 21
    assert all(there.metrics().get(k, 0) == before.get(k, 0) for k in before if k[0] == "temper_requests_total" and k[-1] == "500")


def test_temper_itself_asks_it(there: Server, ai: openai.OpenAI, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": f"Question {k}"}] for k in range(6)]
    decoding = Decoding(max_new_tokens=30, temperature=0.8, top_k=50, min_p=0.01, repetition_penalty=1.1, min_new_tokens=2, stop=["zz"])
    for prompts in (asked, ["Once", "Twice"]):
        found = Endpoint(Address(there.url, "witty")).answer(prompts, decoding, seed=5, step=2)
        for k, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
            how: dict[str, Any] = {
                "model": "witty", "max_tokens": 30, "temperature": 0.8, "stop": ["zz"], "seed": _seed(5, k, 2),
                "extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
            }  # fmt: skip
            if isinstance(prompt, str):
                choice: Any = ai.completions.create(prompt=prompt, **how).choices[0]
                text = choice.text
            else:
                choice = ai.chat.completions.create(messages=prompt, **how).choices[0]
                text = choice.message.content
            assert (answer.text, answer.ended) == (text.strip(), choice.finish_reason == "stop")


def test_the_stage_generate_asks_it(there: Server, ai: openai.OpenAI, tmp_path: Path) -> None:
    recipe = test_generate.write(tmp_path, there.url, n=6, decoding={"max_new_tokens": 40, "temperature": 0}, tries=1, keep=["text"])
    rows = test_generate.rows(temper.run(recipe, out=tmp_path / "run", quiet=True))
    assert rows
    texts = {row["summary"]: row["text"] for row in test_generate.news(6)}
    for row in rows:
        asked: Any = [{"role": "user", "content": f"Образь: {texts[row['completion']]}"}]
        answer = ai.chat.completions.create(model="m", messages=asked, temperature=0, max_tokens=40).choices[0].message.content
        assert answer and row["text"] == answer.strip()


def test_a_judge_behind_it(there: Server, served_models: Path, tmp_path: Path) -> None:
    """It always says FIRST, in both orders: no model wins by that."""
    rows = [{"q": f"What is {k}?", "good": f"It is {k}.", "bad": "Nothing."} for k in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = {
        "stage": "data", "source": "pairs.jsonl", "prompt": "{q}", "chosen": "{good}", "rejected": "{bad}", "validation": 0,
        "test": 5, "near_leaks": False, "drop": {"duplicates": "off"},
    }  # fmt: skip
    look = {
        "stage": "evaluate", "data": "pairs", "resamples": 100, "decoding": {"max_new_tokens": 6}, "models": ["base", str(served_models / "other")],
        "metrics": [{"win_rate": {"against": "base", "judge": f"{there.url}#judge"}}],
    }  # fmt: skip
    recipe = {"name": "r", "model": str(served_models / "base"), "threads": 1, "stages": {"pairs": pairs, "look": look}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    temper.run(tmp_path / "r.yaml", out=tmp_path / "run", quiet=True)
    found = json.loads((tmp_path / "run/look/evaluation.json").read_text())
    facts = json.loads((tmp_path / "run/look/stage.json").read_text())["facts"]
    assert found["models"]["other"]["win_rate"]["value"] == 0.5
    assert "decided by the order alone" in facts["other against base"]


def test_what_the_command_says(served_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPER_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    base = str(served_models / "base")
    (tmp_path / "empty").write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for words, said in (
            (("--host", "0.0.0.0"), ("reached from other machines, and there is no key", "TEMPER_API_KEY")),
            (("--port", str(taken.getsockname()[1])), ("cannot listen on 127.0.0.1", "--port 0 takes a free one")),
            (("--adapter", "witty"), ("an adapter needs a name", "--adapter NAME=PATH")),
            (("--adapter", "a=x", "--adapter", "a=y"), ("two adapters are called «a»",)),
            (("--adapter", "a=nowhere", "--port", "0"), ("there is no adapter nowhere",)),
            (("--adapter", f"a={base}", "--port", "0"), ("holds no adapter",)),
            (("--adapter", f"a={served_models / 'adapters/foreign'}", "--port", "0"), ("trained on another base",)),
            ((base, "--port", "0"), ("two models are called «base»", "NAME=PATH")),
            (("--adapters-from", "nowhere"), ("there is no folder nowhere",)),
            (("--precision", "float"), ("there is no precision «float»", "float32")),
            (("--api-key-file", "nowhere"), ("the key cannot be read from nowhere",)),
            (("--api-key-file", "empty"), ("empty is empty",)),
            (("--device", "abacus"), ("device «abacus» cannot be used",)),
        ):  # fmt: skip
            assert main(["serve", base, *words]) == 1
            shown = " ".join(capsys.readouterr().err.split())
            assert all(part in shown for part in said) and "defect" not in shown, (words, shown)
    monkeypatch.delitem(sys.modules, "temper.serve.run", raising=False)
    monkeypatch.delattr(temper.serve, "run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", base]) == 1
    assert "pip install 'temper-lm[serve]'" in capsys.readouterr().err
