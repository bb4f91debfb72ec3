"""Runs that die on purpose. A warmed process forks one child a run, so that dozens of starts cost one import of torch.

As a script it serves orders, one JSON a line, and answers each with one JSON line. `Workshop` is the other end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
# Threads are part of what makes results bit-equal; waiting ones must not spin against the other test process.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}


class Workshop:
    """The warmed process. `run` starts Temper in a fork of it and tells how that ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)

    def run(
        self,
        folder: Path,
        overrides: dict[str, Any],
        *,
        only: list[str] | None = None,
        force: list[str] | None = None,
        die_at: str | None = None,
        die_after: float | None = None,
        file_limit: int | None = None,
    ) -> dict[str, Any]:
        """One run of the smoke profile of detox-summarization.

        Args:
            overrides: merged over the recipe; threads: 1 is added.
            die_at: SIGKILL at the moment of this name (see `Deaths`).
            die_after: SIGKILL from outside after so many seconds.
            file_limit: RLIMIT_FSIZE in bytes: a longer file cannot be written.

        Returns:
            {"status": exit status, negative for a signal; "error": type and text, or None; "traceback"; "moments"}
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {
            "folder": str(folder), "overrides": overrides, "only": only or [], "force": force or [],
            "die_at": die_at, "die_after": die_after, "file_limit": file_limit,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Deaths:
    """The moments at which a run changes its folder; at the one named `at` the process is killed, the change half made.

    Every rename has a moment before and one after it; a tensor file is cut in half, a line of metrics too, and a
    folder to be deleted keeps half of its files.
    """

    def __init__(self, at: str | None, folder: Path, tell: Callable[[str], None]) -> None:
        self.at, self.folder, self.tell = at, folder, tell

    def moment(self, what: str, path: Any) -> bool:
        """Note a moment; whether it is the last."""
        path = Path(path)
        name = f"{what} {path.relative_to(self.folder) if path.is_relative_to(self.folder) else path.name}"
        self.tell(name)
        return name == self.at

    @staticmethod
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        import peft.peft_model
        import pyarrow.parquet
        import transformers.modeling_utils

        from temper.engine import checkpoint, loop

        os.rename = self._around(os.rename)
        os.replace = self._around(os.replace)
        shutil.rmtree = self._halfway_deleted(shutil.rmtree)
        checkpoint.save_file = self._halfway_written(checkpoint.save_file)
        for module in (peft.peft_model, transformers.modeling_utils):
            module.safe_save_file = self._halfway_written(module.safe_save_file)
        rows = pyarrow.parquet.ParquetWriter  # of a whole table, too
        rows.close = self._halfway_closed(rows.close)
        loop.append = self._half_a_line(loop.append)
        fast = transformers.PreTrainedTokenizerFast
        fast._save_pretrained = self._half_a_tokenizer(fast._save_pretrained)

    def _around(self, rename: Callable[..., None]) -> Any:
        def renamed(source: Any, target: Any, **more: Any) -> None:
            if self.moment("before", target):
                self.die()
            rename(source, target, **more)
            if self.moment("after", target):
                self.die()

        return renamed

    def _halfway_deleted(self, rmtree: Callable[..., None]) -> Any:
        def deleted(path: Any, *args: Any, **more: Any) -> None:
            if Path(path).exists() and self.moment("deleting", path):
                files = sorted(p for p in Path(path).rglob("*") if p.is_file())
                for file in files[: (len(files) + 1) // 2]:
                    file.unlink()
                self.die()
            rmtree(path, *args, **more)

        return deleted

    def _halfway_written(self, save: Callable[..., None]) -> Any:
        def saved(tensors: Any, path: Any, *args: Any, **more: Any) -> None:
            save(tensors, path, *args, **more)
            if self.moment("writing", path):
                os.truncate(path, os.path.getsize(path) // 2)
                self.die()

        return saved

    def _halfway_closed(self, close: Callable[..., None]) -> Any:
        def closed(writer: Any) -> None:
            first = writer.is_open
            close(writer)
            if first and self.moment("writing", writer.where):
                os.truncate(writer.where, os.path.getsize(writer.where) // 2)
                self.die()

        return closed

    def _half_a_tokenizer(self, save: Callable[..., Any]) -> Any:
        def saved(tokenizer: Any, save_directory: Any, *args: Any, **more: Any) -> Any:
            names = save(tokenizer, save_directory, *args, **more)
            file = Path(save_directory) / "tokenizer.json"
            if self.moment("writing", file):
                os.truncate(file, os.path.getsize(file) // 2)
                self.die()
            return names

        return saved

    def _half_a_line(self, append: Callable[..., None]) -> Any:
        def appended(file: Path, line: dict[str, Any]) -> None:
            before = os.path.getsize(file) if file.exists() else 0
            append(file, line)
            if self.moment(f"step {line['step']} in", file):
                os.truncate(file, (before + os.path.getsize(file)) // 2)
                self.die()

        return appended


def _child(order: dict[str, Any], pipe: int) -> None:
    """Run Temper; what is told goes through the pipe line by line, so that it outlives a SIGKILL."""
    import temper.app
    from temper.pipeline import Choice

    def tell(**what: Any) -> None:
        os.write(pipe, (json.dumps(what) + "\n").encode())

    if order["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
    Deaths(order["die_at"], Path(order["folder"]), lambda name: tell(moment=name)).install()
    try:
        temper.app.run_recipe(
            "detox-summarization",
            profile="smoke",
            overrides={"threads": 1, **order["overrides"]},
            choice=Choice(only=order["only"], force=order["force"]),
            out=Path(order["folder"]),
            quiet=True,
        )
    except BaseException as error:
        tell(error={"type": type(error).__name__, "text": str(error)}, traceback=traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _served(order: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(order, writing)
    os.close(writing)
    ends = time.monotonic() + order["die_after"] if order["die_after"] is not None else None
    told = b""
    while True:
        left = None if ends is None else max(0.0, ends - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            ends = None
        elif piece := os.read(reading, 1 << 16):
            told += piece
        else:
            break
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = [json.loads(line) for line in told.decode().splitlines()]
    last = next((line for line in lines if "error" in line), {"error": None, "traceback": ""})
    return {"status": status, **last, "moments": [line["moment"] for line in lines if "moment" in line]}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")  # whatever is printed goes elsewhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _warm()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_served(json.loads(line))) + "\n")
        answers.flush()


def _warm() -> None:
    """Import all that a run imports on its way, by running one."""
    import temper.app

    short, answers = {"max_steps": 1, "samples": 0}, {"take": 2, "decoding": {"max_new_tokens": 2}}
    small = {
        "corpus": {"take": 30}, "news": {"take": 40}, "tiny": {"max_steps": 1}, "teacher": short, "judge": {"max_steps": 1},
        "sft": short, "before": answers, "grpo": {"max_steps": 2}, "compare": answers,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        temper.app.run_recipe(
            "detox-summarization",
            profile="smoke",
            overrides={"threads": 1, "stages": small},
            out=Path(folder),
            quiet=True,
        )


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of the finished stages of a run, and of its evaluation."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "@" not in name and ".partial" not in name and path.name.endswith((".safetensors", "evaluation.json")):
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file without what the clock and the machine decide; none where it is absent."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    clock = {"seconds", "tokens_per_second", "cpu_percent", "memory_gb", "gpu_percent", "gpu_memory_gb"}
    return [{k: v for k, v in json.loads(t).items() if k not in clock} for t in lines]


def copy_stages(source: Path, target: Path, *names: str, but: Collection[str] = ()) -> Path:
    """A run folder that holds finished stages of another: those named, or without names all of them but a few."""
    target.mkdir(parents=True)
    for name in names or sorted({p.parent.name for p in source.glob("*/stage.json")} - set(but)):
        shutil.copytree(source / name, target / name)
    return target


def whole_stages(folder: Path) -> None:
    """Whatever stands under a stage's own name is complete."""
    from temper.runfolder import damage, read_json

    for path in folder.iterdir():
        if path.is_dir() and "." not in path.name and path.name != "report":
            assert damage(path, read_json(path / "stage.json")["files"]) is None


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    try:
        yield made
    finally:
        made.close()


if __name__ == "__main__":
    _serve()
