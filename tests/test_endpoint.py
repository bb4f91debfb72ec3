"""The client of endpoints against a real server on loopback that answers, refuses, stumbles and hangs up."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import re
import time
from typing import Any

import pytest

from served import Asked, Reply, Script, chat, completion, serving
from temper.address import Address, endpoint
from temper.errors import ModelError, RecipeError
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Answer, Endpoint

NOBODY = Address("http://127.0.0.1:9/v1", "m")  # the discard port: nobody listens


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEMPER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(script: Script, prompts: list[Any], decoding: Decoding | None = None, **how: Any) -> list[Answer]:
    settings = {"attempts": 4, "pause": 0.005, "timeout": 5.0, **how}
    with serving(script) as served:
        return Endpoint(Address(served.url, "m"), **settings).answer(prompts, decoding or Decoding())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_come_in_the_order_of_the_prompts_and_no_more_are_asked_at_once() -> None:
    def script(asked: Asked) -> Reply:
        return chat(f"a{asked.prompt[1:]}")._replace(wait=0.05 if asked.prompt in ("q0", "q7") else 0.01)

    with serving(script) as served:
        asker = Endpoint(Address(served.url, "m"), concurrency=3)
        done: list[int] = []
        found = asker.answer([user(f"q{k}") for k in range(12)], Decoding(), progress=done.append)
        assert [a.text for a in found] == [f"a{k}" for k in range(12)] and sum(done) == 12
        assert served.most_at_once == 3 and len(served.requests) == 12
        again = Endpoint(Address(served.url, "m"), concurrency=1)
        served.most_at_once = 0
        again.answer([user(f"q{k}") for k in range(4)], Decoding())
        assert served.most_at_once == 1


def test_chat_and_plain_text_go_to_their_own_paths_with_what_differs_from_the_defaults() -> None:
    with serving(lambda asked: chat("x") if "messages" in asked.body else completion(" y\n")) as served:
        asker = Endpoint(Address(served.url, "org/m"))
        assert asker.answer([user("q")], Decoding(temperature=0.8, max_new_tokens=7)) == [Answer("x", True)]
        assert asker.answer(["Once"], Decoding(top_k=5, top_p=0.9, min_p=0.1, stop=["\n"])) == [Answer("y", True)]
        first, second = served.requests
        assert first.path == "/v1/chat/completions" and second.path == "/v1/completions"
        seeds = [r.body.pop("seed") for r in (first, second)]
        assert all(0 <= s < 2**31 for s in seeds)
        assert first.body == {"model": "org/m", "messages": user("q"), "max_tokens": 7, "temperature": 0.8}
        assert second.body == {
            "model": "org/m", "prompt": "Once", "max_tokens": 128, "temperature": 0.0,
            "top_k": 5, "top_p": 0.9, "min_p": 0.1, "stop": ["\n"],
        }  # fmt: skip


def test_half_a_character_does_not_reach_the_files() -> None:
    (found,) = ask(
        lambda asked: Reply(body='{"choices": [{"message": {"content": "a\\ud83d b \\ud83d\\ude00"}}]}'), [user("q")]
    )
    assert found.text == "a\ufffd b 😀" and found.text.encode() and not found.ended


def test_the_seed_is_that_of_the_number_and_the_step_not_of_the_place() -> None:
    with serving(lambda asked: "x") as served:
        asker = Endpoint(Address(served.url, "m"), concurrency=1)

        def seeds(prompts: list[str], **how: Any) -> list[int]:
            before = len(served.requests)
            asker.answer([user(p) for p in prompts], Decoding(temperature=1), **how)
            return [r.body["seed"] for r in served.requests[before:]]

        both = seeds(["a", "b"], seed=3, step=0, numbers=[10, 11])
        assert seeds(["b"], seed=3, step=0, numbers=[11]) == both[1:]
        others = seeds(["a"], seed=3, step=1, numbers=[10]) + seeds(["a"], seed=4, step=0, numbers=[10])
        assert len({*both, *others}) == 4


def test_an_answer_cut_by_the_limit_did_not_end() -> None:
    assert ask(lambda asked: chat("x y", "length"), [user("q")]) == [Answer("x y", False)]


@pytest.mark.parametrize(
    ("stumble", "kind"),
    [
        (Reply(429, json.dumps({"error": {"message": "slow down"}})), "status 429"),
        (Reply(500, "oops"), "status 500"),
        (Reply(503, ""), "status 503"),
        (Reply(hang_up=True), "broken connection"),
        (Reply(200, "<html>not JSON</html>"), "garbage"),
        (Reply(200, ""), "garbage"),
        (Reply(200, "[]"), "garbage"),
        (Reply(200, '{"choices": []}'), "garbage"),
        (Reply(200, '{"choices": [null]}'), "garbage"),
        (Reply(200, '{"choices": [{"message": {"content": ["x"]}}]}'), "garbage"),
        (Reply(200, "\xff", {"Content-Encoding": "gzip"}), "garbage"),
        (chat(""), "empty"),
        (chat(None), "empty"),
    ],
)
def test_what_may_pass_is_asked_again(stumble: Reply, kind: str) -> None:
    def script(asked: Asked) -> Reply | str:
        return stumble if asked.before == 0 else f"{asked.prompt}!"

    with serving(script) as served:
        asker = Endpoint(Address(served.url, "m"), pause=0.005, attempts=3, timeout=5)
        found = asker.answer([user("a"), user("b")], Decoding())
        assert [a.text for a in found] == ["a!", "b!"]
        assert asker.troubles == {kind: 2}
        assert len(served.requests) == 4


@pytest.mark.parametrize(
    ("reply", "said", "do"),
    [
        (Reply(500, "the GPU fell off"), "status 500: the GPU fell off", "the fault is the server's"),
        (Reply(503, "loading"), "status 503: loading", "or try later"),
        (
            Reply(429, json.dumps({"error": {"message": "no quota"}})),
            "status 429: no quota",
            "lower concurrency, or wait",
        ),
        (Reply(hang_up=True), "broken connection", "is the server up"),
        (Reply(200, "<html>" + "x" * 1000), "garbage: <html>xxx", "OpenAI-compatible"),
        (Reply(200, ""), "garbage: an empty body", "OpenAI-compatible"),
        (Reply(200, "x", wait=1.0), "no answer in time: nothing came within 0.2 s", "overloaded"),
    ],
)
def test_the_last_attempt_says_what_came_and_what_may_help(reply: Reply, said: str, do: str) -> None:
    with serving(lambda asked: reply) as served:
        asker = Endpoint(Address(served.url, "m"), pause=0.005, attempts=2, timeout=0.2)
        with pytest.raises(ModelError, match=re.escape(said)) as error:
            asker.answer([user("a")], Decoding())
        assert "in 2 attempts" in error.value.what and len(error.value.what) < 450
        assert error.value.where == f"{served.url}#m" and do in error.value.do
        assert "is the server up" not in error.value.do or do == "is the server up"
        assert len(served.requests) == 2


@pytest.mark.parametrize(
    ("status", "do"),
    [(401, "TEMPER_API_KEY"), (403, "TEMPER_API_KEY"), (404, "base URL"), (400, "too long"), (302, "see")],
)
def test_what_will_not_pass_is_told_at_once(status: int, do: str) -> None:
    message = "The model `m` does not exist."
    with serving(lambda asked: Reply(status, json.dumps({"error": {"message": message}}))) as served:
        with pytest.raises(ModelError, match=f"status {status}: The model") as error:
            Endpoint(Address(served.url, "m"), pause=0.005, concurrency=1).answer([user("a"), user("b")], Decoding())
        assert do in error.value.do
        assert len(served.requests) == 1, "the other prompts are not asked any more"


def test_that_it_waits_and_tries_again_is_said_once() -> None:
    told: list[str] = []

    def script(asked: Asked) -> Reply | str:
        return Reply(429, "slow down") if asked.before < int(asked.prompt) else "x"

    ask(script, [user("1")], tell=told.append)
    assert told == [], "a single stumble is no news"
    ask(script, [user("2"), user("3")], tell=told.append)
    assert len(told) == 1 and "status 429" in told[0] and "up to 4 times" in told[0]
    with pytest.raises(ModelError):
        ask(lambda asked: Reply(500), [user("a")], attempts=2, tell=told.append)
    assert len(told) == 1, "the last attempt is an error, and nothing is waited for"


def test_nobody_listens() -> None:
    with pytest.raises(ModelError, match="broken connection") as error:
        Endpoint(NOBODY, pause=0.005, attempts=2).answer([user("a")], Decoding())
    assert "is the server up" in error.value.do


def test_a_pause_that_the_server_asks_for_is_kept() -> None:
    def script(asked: Asked) -> Reply | str:
        return Reply(429, "", {"Retry-After": "0.3"}) if asked.before == 0 else "x"

    began = time.monotonic()
    ask(script, [user("a")])
    assert 0.3 <= time.monotonic() - began < 3

    def dated(asked: Asked) -> Reply | str:
        past = {"Retry-After": email.utils.formatdate(time.time() - 5, usegmt=True)}
        return Reply(503, "", past) if asked.before == 0 else "x"

    assert ask(dated, [user("a")], pause=60.0) == [Answer("x", True)], "a date that has passed asks for no pause"
    with pytest.raises(ModelError, match="asks to wait 7,200 s"):
        ask(lambda asked: Reply(429, "come tomorrow", {"Retry-After": "7200"}), [user("a")])


def test_pauses_grow() -> None:
    times: list[float] = []

    def script(asked: Asked) -> Reply:
        times.append(time.monotonic())
        return Reply(500, "x")

    with pytest.raises(ModelError):
        ask(script, [user("a")], pause=0.05, attempts=4)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    for k, gap in enumerate(gaps):  # half of it at least; the machine may be slow
        assert gap >= 0.025 * 2**k


def test_a_model_with_nothing_to_say_is_believed_once_others_were_answered() -> None:
    found = ask(lambda asked: chat("" if asked.prompt == "b" else "x"), [user("a"), user("b")])
    assert found == [Answer("x", True), Answer("", True)]
    with pytest.raises(ModelError, match="every answer of the endpoint is empty") as error:
        ask(lambda asked: chat("", "length"), [user("a"), user("b")])
    assert "max_new_tokens" in error.value.do


def test_the_key_comes_from_the_environment_and_is_told_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(asked: Asked) -> Reply | str:
        given = asked.headers.get("authorization")
        if given == "Bearer right":
            return "x"
        return Reply(401, json.dumps({"error": {"message": f"wrong key: {given}"}}))

    with pytest.raises(ModelError, match="wrong key: None"):
        ask(script, [user("a")])
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert ask(script, [user("a")])[0].text == "x"
    monkeypatch.setenv("TEMPER_API_KEY", "sk-secret")
    with pytest.raises(ModelError) as error:
        ask(script, [user("a")])
    assert "sk-secret" not in str(error.value) and "wrong key: Bearer …" in str(error.value)
    monkeypatch.setenv("TEMPER_API_KEY", "ключ")
    with pytest.raises(ModelError, match="no key has"):
        ask(script, [user("a")])


def test_within_a_loop_that_runs_already_as_in_a_notebook() -> None:
    async def cell() -> list[Answer]:
        return ask(lambda asked: "x", [user("a")])

    assert asyncio.run(cell()) == [Answer("x", True)]


def test_nothing_is_asked_for_no_prompts() -> None:
    assert Endpoint(NOBODY).answer([], Decoding()) == []


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("http://127.0.0.1:8000/v1", "which model"),
        ("http://127.0.0.1:8000/v1#", "which model"),
        ("https:///v1#m", "which host"),
        ("http://me:sk-secret@host/v1#m", "more than a host"),
        ("https://host/v1?key=sk-secret#m", "more than a host"),
        ("http://host:port/v1#m", "is no address"),
    ],
)
def test_addresses_that_are_none(reference: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        endpoint(reference, where="recipe.yaml:3")
    assert error.value.where == "recipe.yaml:3" and "sk-secret" not in str(error.value)


def test_addresses() -> None:
    assert endpoint("https://api.openai.com/v1/#gpt#5") == Address("https://api.openai.com/v1", "gpt#5")
    assert str(endpoint("http://h/v1/#m")) == "http://h/v1#m"
    assert endpoint("org/name@main") is None and endpoint("./http/x") is None and endpoint("base") is None
