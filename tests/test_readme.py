"""Everything that README.md and docs/recipes.md show is exercised, in the order of the page.

What a reader would type runs as it stands, in a folder with the files that the page speaks of. Only what would install
something, ask a hub or take minutes is mapped to its nearest quick relative, here in `Reader`; a command or a block
that `Reader` does not know fails the test.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from ruamel.yaml import YAML

from hubbed import hub_served, pushed
from served import Asked, serving
from serving import Server
from temper import recipe as recipes
from temper.app import folder_of
from temper.cli import app, main
from temper.data import mini
from temper.errors import RecipeError

ROOT = Path(__file__).parents[1]
PAGES = [("README.md", "docs/serving.md"), ("docs/recipes.md",)]  # the second of a reader goes on where the first ends
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of processes that share two cores
ENDPOINT = "http://127.0.0.1:8000/v1"
NEEDS_HUB = {"hub.yaml"}  # loaded and checked, not run
LONG = "detox-summarization"  # the quickstart's
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def teacher(asked: Asked) -> str:
    """Stands for the model behind the pages' endpoint: other words where it is asked for them, else a new question."""
    if asked.prompt.startswith("Say this in other words"):
        return f"Якщо коротко й іншими словами: {asked.prompt.partition(chr(10))[2]} Ось так воно й було насправді."
    n = asked.body["seed"]
    return f"Чому {n % 997} людей у {n % 991} містах за {n % 983} днів написали {n % 977} листів про {n % 971} свят?"


class Block(NamedTuple):
    language: str
    text: str
    where: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        AssertionError: a fence that this file could overlook, such as an indented one.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(m[1], m[2], f"{page}:{text.count(chr(10), 0, m.start()) + 1}")
        for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    ]
    assert 2 * len(found) == len(re.findall(r"^\s*(?:```|~~~)", text, re.M)), f"{page}: a block that is not read"
    return found


class Reader:
    """Does what a page says, in the current folder."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.recipe = ""  # the page's recipe, under its overlays
        self.ran: set[str] = set()
        self.server: Server | None = None  # the last one that was started, until the next

    def block(self, block: Block) -> None:
        if block.language in {"bash", "console"}:
            for line in block.text.splitlines():
                if line.strip():
                    self.command(line.removeprefix("$ "), block.where)
        elif block.language == "yaml":
            self.yaml(block)
        elif block.language == "python":
            if name := re.match(r"# (\w+\.py)\n", block.text):  # a module of the reader's own
                Path(name[1]).write_text(block.text, encoding="utf-8")
            text = block.text.replace("http://127.0.0.1:8080", self.server.address) if self.server else block.text
            exec(compile(text, block.where, "exec"), {"__name__": "page"})
            for run in re.findall(r'out="([^"]+)"', block.text):
                assert (Path(run) / "report" / "index.html").is_file(), self.capfd.readouterr().out
        elif block.language == "text":  # commands of other programs, shown and not run
            assert not re.search(r"^(\$ )?(temper|torchrun|make|pip|uv)\b", block.text, re.M), f"{block.where}: this could be run"
        else:
            pytest.fail(f"{block.where}: nobody knows how to exercise a block of «{block.language}»")

    def command(self, line: str, where: str) -> None:
        match shlex.split(line, comments=True):
            case ["temper", *words]:
                self.temper(words, where)
            case ["torchrun", *words]:
                torchrun = str(Path(sys.executable).parent / "torchrun")
                subprocess.run([torchrun, *words], check=True, capture_output=True, env=os.environ | QUIET)
            case ["make", target]:
                check_make(target)
            case ["pip", "install", *words] | ["uv", "pip", "install", *words]:
                check_install(words)
            case _:
                pytest.fail(f"{where}: nobody knows how to exercise «{line}»")

    def temper(self, words: list[str], where: str) -> str:
        if words[0] == "run" and words[1] in recipes.shipped():  # ask the hub, or take minutes with `mini`
            words = [*words[:2], "--profile", "smoke"]
        if words[0] == "serve":
            return self.serve(words)
        if words[0] == "push":
            with hub_served() as address:
                shown = pushed(address, *words[1:])
            assert shown.returncode == 0, shown.stderr
            return shown.stdout
        if words[0] == "prune":
            words = [*words, "--yes"]
        with contextlib.ExitStack() as stack:
            if words[0] == "chat":
                stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO("Що нового?\n/help\n")))
            code = main(words)
        out, err = self.capfd.readouterr()
        assert code == 0, f"{where}: temper {shlex.join(words)}\n{out}\n{err}"
        assert out.strip() and not (words[0] == "chat" and err), err
        if words[0] == "run":
            self.ran.add(words[1])
        if words[0] in {"run", "report"}:
            page = Path(out.strip().splitlines()[-1].removeprefix("report: "))
            assert "</html>" in page.read_text(encoding="utf-8")
        if words[0] == "schema":
            assert "stages" in json.loads(out)["properties"]
        if words[0] == "new":
            assert recipes.load(f"{words[1]}.yaml", profile="mini").name == words[1]
        return out

    def serve(self, words: list[str]) -> str:
        """The server starts, on a free port, lists its models and gives its page; it stays until the next."""
        self.close()
        words = [*words[1:], "--port", "0"]  # the last --port is the one that counts
        self.server = Server(*words)
        models = [m["id"] for m in self.server.get("/v1/models").json()["data"]]
        assert models and "<title>" in self.server.get("/").text
        return ", ".join(models)

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stop() == 130  # Ctrl-C
        self.server = None

    def yaml(self, block: Block) -> None:
        """A recipe is loaded with each of its profiles, an overlay is laid over it and run."""
        name = re.match(r"# ([\w-]+\.yaml)\n", block.text)
        assert name, f"{block.where}: the first line names the file"
        file = Path(name[1])
        file.write_text(block.text, encoding="utf-8")
        raw = read(file)
        if "name" in raw:
            self.recipe = name[1]
            for profile in [None, *raw.get("profiles", {})]:
                recipes.load(file, profile=profile)
        elif name[1] in NEEDS_HUB:
            recipes.load(self.recipe, overlays=[file])
        else:
            with serving(teacher) as served:
                file.write_text(block.text.replace(ENDPOINT, served.url), encoding="utf-8")
                self.temper(["run", self.recipe, "--config", name[1], "--out", f"runs/with-{file.stem}"], block.where)


def read(file: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(file)


def check_make(target: str) -> None:
    """What the target would run: its programs are installed, its files are there, and Temper's part runs as `smoke`."""
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [shlex.split(line) for line in shown.splitlines()]
    for words in commands:
        words = [w for w in words if not re.match(r"[A-Z_]+=", w)]  # OMP_NUM_THREADS=1 pytest
        if words[0].startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(words[0]).name).is_file(), words[0]
        for word in words[1:]:
            if word.startswith("tests/") or word.endswith(".txt"):
                assert (ROOT / word).is_file(), word
        if words[0] == ".venv/bin/pip":
            check_install(words[words.index("install") + 1 :])
        if words[0] == ".venv/bin/temper":
            check_quickstart(words[1:], shown)


def check_quickstart(words: list[str], shown: str) -> None:
    assert words == ["run", LONG, "--profile", "mini"]
    mini_run, smoke_run = recipes.load(LONG, profile="mini"), recipes.load(LONG, profile="smoke")
    report = f"{folder_of(mini_run, None).as_posix()}/report/index.html"
    assert report in shown and report in (ROOT / "README.md").read_text(encoding="utf-8")
    assert list(mini_run.stages) == list(smoke_run.stages)  # so that the smoke profile stands for it
    assert main([*words[:-1], "smoke"]) == 0


def check_install(words: list[str]) -> None:
    """What is installed is this checkout, with extras that it has; pip itself reads the line where it can build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [word for word in words if word.startswith(".")]
    assert len(wanted) == 1
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", wanted[0])
    assert extra and (extra[1] is None or extra[1] in project["optional-dependencies"])
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    if importlib.util.find_spec("hatchling") and importlib.util.find_spec("pip"):
        pip_reads(*(word for word in words if word != "-e"))  # editable metadata would need one package more


@functools.cache
def pip_reads(*words: str) -> None:
    harmless = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *harmless, *words], cwd=ROOT, check=True)


def write_files(folder: Path) -> None:
    """The files that the pages speak of."""
    news = list(mini.load("uk-news", split=None, rows=40, seed=3))
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as out:
        for row in news:
            out.write(json.dumps({"question": row["title"], "answer": row["summary"]}, ensure_ascii=False) + "\n")
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as out:
        for row in news:
            turns = [{"role": "user", "content": row["title"]}, {"role": "assistant", "content": row["summary"]}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    with open(folder / "votes.jsonl", "w", encoding="utf-8") as out:  # as the playground gives them
        for row in news[:20]:
            vote = {"prompt": row["title"], "chosen": row["summary"], "rejected": "…", "chosen_model": "sft", "rejected_model": "base", "who": "ann"}
            out.write(json.dumps(vote, ensure_ascii=False) + "\n")
    with open(folder / "jokes.jsonl", "w", encoding="utf-8") as out:
        for joke in mini.load("ru-jokes", rows=120):
            out.write(json.dumps(joke, ensure_ascii=False) + "\n")
    (folder / "shards").mkdir()
    asked = [{"question": row["title"], "answer": row["summary"]} for row in mini.load("uk-news", rows=90, seed=4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), folder / "shards" / "0.parquet", row_group_size=40)
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["question", "answer", "topic"])
        table.writerows([r["title"], r["summary"], r["topic"]] for r in news)


@pytest.fixture
def folder(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: a model, data, and the shipped recipe's smoke profile run already."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke_run, tmp_path / "runs" / f"{LONG}-smoke")
    shutil.copytree(smoke_run / "tiny" / "model", tmp_path / "my-model")
    (tmp_path / "my-model" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pages", PAGES, ids=lambda pages: pages[0])
def test_all_that_pages_show(pages: tuple[str, ...], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader = Reader(capfd)
    for page in pages:
        with contextlib.closing(reader):
            for block in blocks(page):
                reader.block(block)
    own = {file.name for file in folder.glob("*.yaml") if "name" in read(file)} - {f"{LONG}.yaml"}
    assert own and own <= reader.ran, "a recipe that the page shows and never runs"


@pytest.mark.parametrize(
    "text", ["bash\ncurl -O it", "bash\ntemper fly", "bash\npip install left-pad", "bash\nmake coffee", "toml\na = 1", "text\ntemper list"]
)
def test_what_is_not_known_fails(text: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    language, _, body = text.partition("\n")
    with pytest.raises((AssertionError, pytest.fail.Exception, subprocess.CalledProcessError)):
        Reader(capfd).block(Block(language, body, "here"))


def test_an_overlay_with_an_unknown_key_fails(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader = Reader(capfd)
    reader.block(next(b for b in blocks("README.md") if b.language == "yaml"))
    with pytest.raises(AssertionError, match="did you mean «lr»"):
        reader.block(Block("yaml", "# wrong.yaml\nstages:\n  sft: {lrr: 1}\n", "here"))
    with pytest.raises(RecipeError):
        reader.block(Block("yaml", "# wrong.yaml\nname: wrong\nstages:\n  a: {stage: dat}\n", "here"))


def pages() -> Iterator[tuple[str, str]]:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "text"), pages())
def test_links_lead_somewhere(page: str, text: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize(("page", "text"), pages())
def test_commands_within_sentences_exist(page: str, text: str) -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}  # type: ignore[union-attr]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for program, word in re.findall(r"`(temper|make) ([a-z-]+)", text):
        assert word in (commands if program == "temper" else targets), f"{page}: {program} {word}"


def test_the_picture_is_small() -> None:
    picture = (ROOT / "docs" / "picture" / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) < 250_000


def test_the_design_page_maps_the_package() -> None:
    """Every module is in the map, and imports only what stands above it."""
    package = ROOT / "src" / "temper"
    listed = re.findall(r"^\| `([\w/.]+)` \|", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.M)

    def place(module: str) -> int | None:
        return next((k for k, x in enumerate(listed) if module == x or (x[-1] == "/" and module.startswith(x))), None)

    for name in listed:
        assert (package / name).exists(), f"{name} is in the map and not in the package"
    for file in sorted(package.rglob("*.py")):
        module = file.relative_to(package).as_posix()
        if file.name == "__init__.py" and place(module) is None:
            continue  # a folder's law; of the package itself, the door
        here = place(module)
        assert here is not None, f"{module} is not in the map"
        for other in imported(file, package):
            there = place(other)
            assert there is None or there <= here, f"{module} imports {other}, which stands below it"


def imported(file: Path, package: Path) -> Iterator[str]:
    """Files of the package that a file imports, but for names of types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "temper":
            base = node.module.split(".")[1:]
            for parts in [base, *([*base, alias.name] for alias in node.names)]:
                with contextlib.suppress(ValueError, IndexError):
                    for path in (
                        package.joinpath(*parts[:-1], f"{parts[-1]}.py"),
                        package.joinpath(*parts, "__init__.py"),
                    ):
                        if path.is_file():
                            yield os.path.relpath(path, package).replace(os.sep, "/")
