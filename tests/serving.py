"""What the tests of the server share: small models and adapters in a folder, the server as a process, and one within."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaConfig, LlamaForCausalLM

from preferred import model_at, words
from temper import hub
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.serve.answering import Desk
from temper.serve.engine import Engine
from temper.serve.gallery import Gallery
from test_chat import CHATML, small
from tiny_models import sharpen

CONTEXT = 400
COMMAND = [sys.executable, "-u", "-c", "from temper.cli import main; raise SystemExit(main())", "serve"]
LORA = {"witty": Adapter(r=4), "dry": Adapter(r=2, alpha=6, targets=["q_proj", "down_proj"]), "late": Adapter(r=3)}
OTHERS = {"dora": Adapter(r=2, dora=True), "scaled": Adapter(method="ia3"), "soft": Adapter(method="prompt", tokens=5)}


def shop(folder: Path) -> None:
    """base/, a Llama with a chat template that ends about every thirtieth token; adapters/NAME of it; other/ and adapters/foreign,
    which is of that one; t5/ and bloom/, which `generate` decodes; judge/, which says FIRST;
    gpt2/ and mixtral/ with adapters/on-gpt2 and adapters/on-mixtral."""
    folder.mkdir()
    for seed, name in enumerate(("base", "other")):
        tokenizer = small(CHATML)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        hf = LlamaForCausalLM(config)
        sharpen(hf, seed)
        assert hf.generation_config is not None
        hf.generation_config.eos_token_id = [end, *range(120, 130)]  # a random model would else hardly end
        hf.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for family in ("t5", "bloom", "gpt2", "mixtral"):
        model_at(folder / family, family, tokenizer=words())
    judge_at(folder / "judge")
    for name, kind in {**LORA, **OTHERS, "foreign": Adapter(r=2)}.items():
        stirred(folder / ("other" if name == "foreign" else "base"), folder / "adapters" / name, kind)
    stirred(folder / "t5", folder / "adapters" / "lines", Adapter(r=2))
    for family in ("gpt2", "mixtral"):
        stirred(folder / family, folder / "adapters" / f"on-{family}", Adapter(r=2, targets="all-linear" if family == "gpt2" else ["q_proj", "v_proj"]))


def judge_at(folder: Path) -> None:
    """A model that answers FIRST to whatever it is asked: its layers add nothing, and each token of that chain calls for the next."""
    tokenizer = small(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chain = [*tokenizer("\nFIRST", add_special_tokens=False)["input_ids"], end]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8192, eos_token_id=end, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
            layer.mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
        hf.model.embed_tokens.weight.zero_()
        hf.lm_head.weight.zero_()
        for k, (now, then) in enumerate(itertools.pairwise(chain)):
            hf.model.embed_tokens.weight[now, k] = 1
            hf.lm_head.weight[then, k] = 9
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stirred(model: Path, folder: Path, kind: Adapter) -> None:
    """An adapter that does something, as a stage leaves it."""
    source = hub.Source(str(model))
    hf = adapters.attach(load.model(source)[0], kind, seed=0)
    draw = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for p in (p for p in hf.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    adapters.save(hf, folder / "adapter", source, stage=None, identity=hub.identity(source))


class Here:
    """A server's parts within this process.

    Args:
        names: adapters of the folder.
    """

    def __init__(self, folder: Path, models: list[str], names: tuple[str, ...] = (), *, queue: int = 256, **how: Any) -> None:
        self.engine = Engine(device="cpu", precision="float32")
        self.engine.start()
        self.gallery = Gallery(self.engine, folders=[folder / "adapters"], **how)
        self.desk = Desk(self.engine, self.gallery, queue=queue)
        self.gallery.open([str(folder / m) for m in models], {n: folder / "adapters" / n for n in names})

    def run(self, do: Callable[[], Awaitable[Any]]) -> Any:
        """Do something in an event loop that hears of news."""

        async def within() -> Any:
            self.engine.serve(asyncio.get_running_loop())
            return await asyncio.wait_for(do(), 120)

        return asyncio.run(within())

    def on_engine(self, do: Callable[[], Any]) -> Any:
        return self.engine.call(do).result(timeout=60)


@contextlib.contextmanager
def here(folder: Path, models: list[str], names: tuple[str, ...] = (), **how: Any) -> Iterator[Here]:
    made = Here(folder, models, names, **how)
    try:
        yield made
    finally:
        made.engine.close()


class Server:
    """`temper serve` as a process of its own, on a free port of loopback."""

    def __init__(self, *given: str, **environment: str) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("TEMPER_API_KEY", "OPENAI_API_KEY")}
        self.process = subprocess.Popen(
            [*COMMAND, *given, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.said: list[str] = []
        self.errors: list[str] = []
        self.readers = [self._reading(self.process.stderr, self.errors)]
        late = threading.Timer(120, self.process.kill)
        late.start()
        self.address = self._address()
        late.cancel()
        self.readers.append(self._reading(self.process.stdout, self.said))

    @staticmethod
    def _reading(pipe: Any, into: list[str]) -> threading.Thread:
        """What it says must not fill the pipe."""

        def read() -> None:
            with pipe:
                into.extend(pipe)

        made = threading.Thread(target=read, daemon=True)
        made.start()
        return made

    def _address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"listening on (http://\S+) ", line):
                return found[1]
        raise AssertionError(f"it did not start: {''.join(self.errors)}")

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def get(self, path: str, **how: Any) -> httpx2.Response:
        return httpx2.get(self.address + path, timeout=60, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx2.Response:
        return httpx2.post(self.address + path, timeout=60, **({"json": body} if body is not None else {}), **how)

    def metrics(self, **how: Any) -> dict[tuple[str, ...], float]:
        """(name, labels' values in the order of their names) → value."""
        return numbers(self.get("/metrics", **how).text)

    def idle(self, seconds: float = 20) -> bool:
        """Whether nothing is under way any more, soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.metrics()[("temper_answers_under_way",)] == 0:
                return True
            time.sleep(0.05)
        return False

    def memory(self) -> int:
        """Bytes that are in memory."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """As Ctrl-C does; the exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=30)
        for reader in self.readers:
            reader.join(10)
        return code


@contextlib.contextmanager
def server(*given: str, **environment: str) -> Iterator[Server]:
    made = Server(*given, **environment)
    try:
        yield made
    finally:
        code = made.stop()
        said = "".join(made.errors)
        assert code in (0, 130) and "Traceback" not in said, (code, said)


def numbers(text: str) -> dict[tuple[str, ...], float]:
    return {
        (s.name, *(s.labels[k] for k in sorted(s.labels))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
