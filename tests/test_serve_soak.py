"""Many clients at once, of whom some hang up in the middle: nobody gets an error, all get what they would get alone, and
nothing is left behind. The whole of it: pytest -m claims -s tests/test_serve_soak.py"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serving import Server, here, server
from temper.rollouts.distribution import uniforms
from temper.rollouts.growing import BROKEN
from test_serve_engine import asked as whole
from test_serve_engine import plain, tied

NAMES = ("base", "witty", "dry", "dora")


def body(k: int) -> dict[str, Any]:
    """Ragged requests; of every fourth the log-probabilities too."""
    draw = random.Random(k)
    prompt = "".join(draw.choice("abcdefgh \n") for _ in range(draw.randint(1, 150)))
    how: dict[str, Any] = {
        "model": draw.choice(NAMES), "seed": k, "max_tokens": draw.choice([4, 20, 60, 200]), "n": draw.choice([1, 1, 1, 3]),
        "temperature": draw.choice([0, 0.7, 1, 1]), "top_p": draw.choice([1, 0.9]),
    }  # fmt: skip
    if k % 4 == 0:
        how["min_tokens"] = min(how["max_tokens"], 50)
    if k % 5 == 0:
        how["stop"] = [draw.choice("xyz"), "qq"]
    return {**how, "prompt": prompt} if k % 3 == 0 else {**how, "messages": [{"role": "user", "content": prompt}]}


async def ask(client: httpx2.AsyncClient, k: int, *, leave: bool = False) -> list[str] | None:
    """The texts of one request, in a stream where `k` is odd; None: it hung up."""
    asked = body(k)
    path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
    draw = random.Random(-k)
    if not k % 2:
        if leave:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.post(path, json=asked), draw.uniform(0.001, 0.05))
            return None
        found = await client.post(path, json=asked)
        assert found.status_code == 200, found.text
        return [c["text"] if "text" in c else c["message"]["content"] for c in found.json()["choices"]]
    texts = [""] * asked["n"]
    async with client.stream("POST", path, json={**asked, "stream": True}) as stream:
        assert stream.status_code == 200, await stream.aread()
        left = draw.randint(0, 4) if leave else -1
        async for line in stream.aiter_lines():
            if left == 0:
                return None
            left -= 1
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        assert line == "" or line == "data: [DONE]"
    return texts


async def crowd(at: Server, numbers: list[int], clients: int, leaving: float) -> dict[int, list[str]]:
    """All requests, so many at once; what those got that stayed."""
    waiting, found = list(reversed(numbers)), {}

    async def one() -> None:
        async with httpx2.AsyncClient(base_url=at.address, timeout=300) as client:
            while waiting:
                k = waiting.pop()
                texts = await ask(client, k, leave=random.Random(k * 7).random() < leaving)
                if texts is not None:
                    found[k] = texts

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return found


def soak(folder: Path, votes: Path, requests: int, clients: int) -> str:
    adapters = [word for name in NAMES[1:] for word in ("--adapter", f"{name}={folder / 'adapters' / name}")]
    with server(str(folder / "base"), *adapters, "--votes", str(votes), "--slots", "16") as at:
        warm = list(range(requests, requests + max(60, requests // 4)))
        asyncio.run(crowd(at, warm, clients, 0.15))
        assert at.idle()
        before, began = at.memory(), time.monotonic()
        found = asyncio.run(crowd(at, list(range(requests)), clients, 0.15))
        seconds = time.monotonic() - began
        assert at.idle(), "nothing is under way when all are gone"
        after = at.memory()
        alone = asyncio.run(crowd(at, sorted(found), 1, 0))
        differ = [k for k in found if found[k] != alone[k]]
        counted = at.metrics()
        ties(folder, {k: found[k] for k in differ})
        assert not [k for k in counted if k[0] == "temper_requests_total" and k[-1] >= "500"]
        assert 0.7 * requests < len(found) < requests
        assert after - before < 20e6, f"{(after - before) / 1e6:.1f} MB more"
        tokens = sum(v for k, v in counted.items() if k[0] == "temper_generation_tokens_total")
        return f"{requests} requests of {clients} clients in {seconds:.0f} s, {requests - len(found)} hung up, {tokens:,.0f} tokens in all; memory {before / 1e6:.0f} → {after / 1e6:.0f} MB, all {len(found)} answers as alone, but for {len(differ)} ties"


def ties(folder: Path, found: dict[int, list[str]]) -> None:
    """Where an answer parts from what is written alone, rounding decides on the token."""
    with here(folder, ["base"], NAMES[1:]) as at:
        for k, texts in found.items():
            asked = body(k)
            work, _ = at.run(lambda asked=asked: whole(at, chat="messages" in asked, **asked))
            hf, tokenizer = plain(folder, asked["model"])
            for n, (draft, text) in enumerate(zip(work.drafts, texts, strict=True)):
                ids = [*draft.ids, *([] if draft.done.end is None else [draft.done.end])]
                so_far = [tokenizer.decode(ids[: p + 1], skip_special_tokens=True).rstrip(BROKEN) for p in range(len(ids))]
                # where it parts, or else ends: one of them has an end token there
                p = next((p for p, said in enumerate(so_far) if not text.startswith(said)), len(text) and len(ids) - 1)
                if so_far[-1:] != [text]:
                    noise = float(uniforms(p + 1, k, 0, 0, n)[p])
                    assert tied(hf, (*work.ids, *ids[:p]), draft.decoding, noise, ids[p]), (asked, p)


def test_a_crowd(served_models: Path, tmp_path: Path) -> None:
    assert "as alone" in soak(served_models, tmp_path / "votes.sqlite", 120, 16)


@pytest.mark.claims
def test_a_thousand_requests_of_64_clients(served_models: Path, tmp_path: Path) -> None:
    print(soak(served_models, tmp_path / "votes.sqlite", 1000, 64))
