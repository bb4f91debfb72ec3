"""What the server refuses, and how it says so: by name, with the right status, and with what to do."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

import temper
import temper.serve
from serving import Server, server
from temper.address import Address
from temper.cli import main
from temper.errors import ModelError
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Endpoint
from test_serve import HELLO, sampled


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


def test_a_key_a_small_queue_and_small_bodies(served_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    monkeypatch.delenv("TEMPER_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
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
        with openai.OpenAI(base_url=made.url, api_key="s3cret", max_retries=0) as client:
            body: dict[str, Any] = {"model": "base", "messages": HELLO, "max_tokens": 300, "extra_body": {"min_tokens": 300}}
            with client.chat.completions.create(**body, n=3, stream=True) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError, match="3 answers are under way, and 3 may be") as full:
                    client.chat.completions.create(**body)
                assert full.value.response.headers["retry-after"] == "1"
            with pytest.raises(ModelError, match="401"):
                Endpoint(Address(made.url, "base")).answer([HELLO], Decoding())
            monkeypatch.setenv("TEMPER_API_KEY", "s3cret")
            answered = Endpoint(Address(made.url, "base"), pause=0.05).answer([HELLO] * 4, Decoding(max_new_tokens=20))
            assert len({a.text for a in answered}) == 1, "more are asked at once than may wait, and they come again"


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
