"""Fixtures that several files share: a small finished run, made once however many processes test."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serving
import temper
import tracked
from preferred import model_at
from staged_runs import ENVIRONMENT, Workshop, workshop

RUN = """
import sys, temper
temper.run("detox-summarization", {"threads": 1}, profile="smoke", out=sys.argv[1], quiet=True)
"""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, build)`: the path that `build` filled, by the first process that asks for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, build: Callable[[Path], None]) -> Path:
        path, mark = shared / name, shared / f"{name}.made"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                build(path)
                mark.touch()
        return path

    return made


@pytest.fixture(scope="session")
def smoke_run(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A finished run folder of detox-summarization's smoke profile, one thread. Read it or copy it."""

    def build(path: Path) -> None:
        environment = {**os.environ, **ENVIRONMENT}
        subprocess.run([sys.executable, "-c", RUN, str(path)], check=True, env=environment, timeout=300)

    return once("smoke-run", build)


@pytest.fixture(scope="session")
def tiny_model(smoke_run: Path) -> Path:
    """A folder with a small Llama and its tokenizer, pretrained for a few steps on Ukrainian sentences."""
    return smoke_run / "tiny" / "model"


@pytest.fixture(scope="session")
def words_model(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder with a tiny Llama of random weights, and a tokenizer of words."""
    return once("words-model", lambda path: model_at(path) and None)


@pytest.fixture(scope="session")
def plain_run(once: Callable[[str, Callable[[Path], None]], Path], words_model: Path) -> Path:
    """A finished run of the recipe in `tracked.py`, without trackers."""

    def build(path: Path) -> None:
        temper.run(tracked.recipe(path, words_model, []), out=path / "run", quiet=True)

    return once("plain-run", build) / "run"


@pytest.fixture(scope="session")
def forks() -> Iterator[Workshop]:
    """Starts of Temper that cost no imports; see staged_runs."""
    with workshop() as made:
        yield made


@pytest.fixture(scope="session")
def served_models(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder with models and adapters to be served; see `serving.shop`."""
    return once("served-models", serving.shop)


@pytest.fixture(scope="session")
def there(served_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """A server as a process of its own."""
    at = served_models
    votes = str(tmp_path_factory.mktemp("votes") / "votes.sqlite")
    with serving.server(
        str(at / "base"), f"m={at / 'base'}", str(at / "judge"), "--adapter", f"witty={at / 'adapters/witty'}",
        "--adapters-from", str(at / "adapters"), "--votes", votes,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="session")
def ai(there: serving.Server) -> Iterator[Any]:
    """The openai package as a client of that server."""
    import openai  # takes a second, and few tests need it

    with openai.OpenAI(base_url=there.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client
