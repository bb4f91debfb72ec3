"""`temper serve` beside `transformers serve`: the same model, machine and requests, 16 clients at once, in turns.

    python benchmarks/serving.py [--rounds 3] [--clients 16] [--requests 64] [--threads 2]

Prompts and answers are of log-normal lengths (the documents of `shapes.py`), decoding is greedy, answers come as streams and
end at their `max_tokens`. Both servers stand from the beginning to the end; the one that is not asked is stopped (SIGSTOP).
transformers serves as it does by default, one request after another, and with --continuous-batching. Printed and written to
benchmarks/results/serving-<machine>.json: tokens a second, time to first token, and the ratios, medians with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import httpx
import shapes
import torch

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
CONTENT, USED = re.compile(rb'"content":"[^"]'), re.compile(rb'"completion_tokens":(\d+)')
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Server:
    """A server's process, stopped but while it is asked."""

    def __init__(self, words: list[str], port: int, threads: int, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
        self._wait()
        self.process.send_signal(signal.SIGSTOP)

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"a server died:\n{self.log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{self.url}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"a server does not answer:\n{self.log.read_text()[-3000:]}")

    def __enter__(self) -> Server:
        self.process.send_signal(signal.SIGCONT)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def requests(n: int) -> list[dict[str, Any]]:
    documents = shapes.lognormal(n)
    return [
        {
            "messages": [{"role": "user", "content": shapes.text(prompt)}], "max_tokens": max(4, len(answer)), "temperature": 0,
            "stream": True,
        }
        for prompt, answer in documents
    ]  # fmt: skip


async def asked(url: str, body: dict[str, Any]) -> tuple[float, int]:
    """(seconds to the first piece of text, tokens written).

    Over a bare socket: on a machine of two cores what a client computes is taken from the server.
    """
    host, port = url.removeprefix("http://").split(":")
    begun, first, last = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{url}: {(status + await reader.read())!r}")
    while line := await reader.readline():
        if first is None and CONTENT.search(line):
            first = time.perf_counter() - begun
        if b'"usage":{' in line:
            last = line
    writer.close()
    found = USED.search(last)
    if first is None or found is None:
        raise SystemExit(f"{url}: a stream without text or without its usage")
    return first, int(found[1])


async def round_of(server: Server, model: str, bodies: list[dict[str, Any]], clients: int, counted: bool) -> dict[str, float]:
    """All requests, as many at a time as there are clients."""
    waiting = list(reversed([body | {"model": model} | ({"stream_options": {"include_usage": True}} if counted else {}) for body in bodies]))
    firsts: list[float] = []
    tokens = 0

    async def one() -> None:
        nonlocal tokens
        while waiting:
            first, n = await asked(server.url, waiting.pop())
            firsts.append(first)
            tokens += n

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": tokens, "rate": tokens / seconds, "first": statistics.median(firsts), "last_first": sorted(firsts)[-max(1, len(firsts) // 20)]}


def saved(folder: Path) -> Path:
    """The shape of the other contests as a Llama with biases: AutoTokenizer gives a Qwen2 its own tokenizer, whatever stands
    beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    same = shapes.config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(attention_bias=True, **{name: same[name] for name in names})).save_pretrained(folder)
    tokenizer = shapes.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def free() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    facts = bench.machine(given.threads, {})
    bodies, results = requests(given.requests), []
    with tempfile.TemporaryDirectory() as folder:
        base = saved(Path(folder) / "base")
        port = free()
        ours = Server([str(BIN / "temper"), "serve", f"base={base}", "--port", str(port)], port, given.threads, Path(folder) / "temper.log")
        try:
            for name, more in (("transformers serve", []), ("transformers serve --continuous-batching", ["--continuous-batching"])):
                port = free()
                words = [str(BIN / "transformers"), "serve", str(base), "--port", str(port), "--host", "127.0.0.1", *more]
                theirs = Server(words, port, given.threads, Path(folder) / "other.log")
                try:
                    taken = []
                    for k in range(given.rounds + 1):
                        some = bodies if k else bodies[: given.clients]  # the first is not timed
                        with ours:
                            a = asyncio.run(round_of(ours, "base", some, given.clients, True))
                        with theirs:
                            b = asyncio.run(round_of(theirs, str(base), some, given.clients, False))
                        if k:
                            taken.append((a, b))
                            print(f"    temper {a['rate']:.0f} tokens/s, first {a['first'] * 1e3:.0f} ms; {name} {b['rate']:.0f} tokens/s, first {b['first'] * 1e3:.0f} ms; {a['tokens']} and {b['tokens']} tokens", flush=True)
                finally:
                    theirs.end()
                results.append(summed(name, taken))
        finally:
            ours.end()
    file = given.out or HERE / "results" / f"serving-{bench.name_of(facts)}.json"
    file.write_text(json.dumps({"machine": facts, "clients": given.clients, "requests": given.requests, "against": results}, indent=1) + "\n")
    print(f"written: {file}")


def summed(name: str, taken: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    def ratio(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}

    rate, first = ratio([a["rate"] / b["rate"] for a, b in taken]), ratio([b["first"] / a["first"] for a, b in taken])
    print(f"{name}: {rate['median']:.2f} times the tokens a second ({rate['low']:.2f} to {rate['high']:.2f}), first token {first['median']:.2f} times as soon ({first['low']:.2f} to {first['high']:.2f})")
    return {
        "name": name, "rate_ratio": rate, "first_token_ratio": first,
        "temper": [a for a, _ in taken], "other": [b for _, b in taken],
    }  # fmt: skip


if __name__ == "__main__":
    main()
