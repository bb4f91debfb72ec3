"""The server as a process of its own, asked as programs ask it: by the openai package, by plain HTTP, by Temper itself."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

import temper
import temper.serve
import test_generate
from serving import Server
from temper import hub
from temper.address import Address
from temper.data.chat import Encoder
from temper.data.forms import Format
from temper.models import adapters, load
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Endpoint
from temper.rollouts.patience import seed_of
from temper.rollouts.sampler import Sampler
from temper.types import Record

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
LONG = {"model": "base", "messages": HELLO, "max_tokens": 300, "min_tokens": 300, "seed": 1}


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


def test_token_ids_as_vllm_gives_them(ai: openai.OpenAI, there: Server, served_models: Path) -> None:
    """They come back with their end token, and end where they are told to, not where the model would have it."""
    source = hub.Source(str(served_models / "base"))
    hf, tokenizer = load.model(source)[0], load.tokenizer(source)
    ids, own = tokenizer("Hello")["input_ids"], load.end_ids(hf)
    body: dict[str, Any] = {"model": "base", "prompt": ids, "n": 3, "seed": 4, "max_tokens": 40, "logprobs": 0, "return_token_ids": True}
    seen = set()
    (free,) = Sampler(hf, tokenizer, end_ids=[]).sample([ids], Decoding(max_new_tokens=40, temperature=1.0), completions=3, seed=4)
    early, late = free[1].ids[5], free[2].ids[20]
    for ends, how in [
        (own, {}), ({*own, early}, {"stop_token_ids": [early]}), ({late}, {"stop_token_ids": [late], "ignore_eos": True}), (set(), {"ignore_eos": True}),
    ]:  # fmt: skip
        (expected,) = Sampler(hf, tokenizer, end_ids=ends).sample([ids], Decoding(max_new_tokens=40, temperature=1.0), completions=3, seed=4)
        choices = there.post("/v1/completions", {**body, **how}).json()["choices"]
        assert [c["token_ids"] for c in choices] == [c.scored for c in expected] and all(c["prompt_token_ids"] == ids for c in choices)
        assert [c["finish_reason"] for c in choices] == ["stop" if c.ended else "length" for c in expected]
        assert all(len(c["logprobs"]["token_logprobs"]) == len(c["token_ids"]) for c in choices)
        seen.add(tuple(len(c.scored) for c in expected))
    assert len(seen) == 4, "each of these ends is heard"
    without = there.post("/v1/completions", {**body, "return_token_ids": False}).json()["choices"][0]
    assert "token_ids" not in without and "prompt_token_ids" not in without
    echoed = there.post("/v1/completions", {**body, "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert (echoed["prompt_token_ids"], echoed["token_ids"]) == (ids, [])
    refused = there.post("/v1/completions", {**body, "stream": True})
    assert refused.status_code == 400 and "«return_token_ids» cannot be streamed" in refused.json()["error"]["message"]
    refused = there.post("/v1/chat/completions", {"model": "base", "messages": HELLO, "return_token_ids": True})
    assert refused.status_code == 400 and "«return_token_ids» is not supported" in refused.json()["error"]["message"]


def test_models_are_listed(ai: openai.OpenAI, there: Server) -> None:
    cards = {m.id: m for m in ai.models.list()}
    assert list(cards) == ["base", "m", "judge", "witty"]
    one = ai.models.retrieve("witty")
    assert one == cards["witty"] and one.model_dump()["parent"] == "base" and one.model_dump()["max_model_len"] == 400
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nobody")


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
                "model": "witty", "max_tokens": 30, "temperature": 0.8, "stop": ["zz"], "seed": seed_of(5, k, 2),
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
