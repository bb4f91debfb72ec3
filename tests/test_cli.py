"""The command line as a user meets it: what it prints, where, with which exit code, and what it leaves on disk."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from staged_runs import ENVIRONMENT
from temper import cli, doctor, terminal
from temper.runfolder import write_sealed

TEMPER = [str(Path(sys.executable).with_name("temper"))]  # the installed command
SMOKE = ["detox-summarization", "--profile", "smoke"]
NAMES = [  # in the order they run
    "corpus", "tiny", "news", "clean_news", "rude_words", "teacher", "sentences", "judge", "toxic_news",
    "sft", "before", "grpo", "compare",
]  # fmt: skip
AFTER_SFT = ["sft", "before", "grpo", "compare"]  # what changes with sft


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def temper(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`temper("run", …)` in this process."""

    def call(*words: object) -> Ended:
        capsys.readouterr()
        code = cli.main([str(w) for w in words])
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def run_folder(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished smoke run."""
    shutil.copytree(smoke_run, tmp_path / "run")
    return tmp_path / "run"


def shell(*words: object, **environment: str) -> Ended:
    """`temper …` as a process of its own."""
    done = subprocess.run(
        [*TEMPER, *map(str, words)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_short_error(ended: Ended, *parts: str) -> None:
    """A few lines on stderr, no traceback, exit code 1."""
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err + ended.out
    assert ended.err.startswith("error: ") and "\ndo: " in ended.err, ended.err
    assert len(ended.err.splitlines()) <= 6, ended.err
    for part in parts:
        assert part in ended.err, ended.err


# ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_importing_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import temper; took = time.perf_counter() - t; "
        "import temper.cli; heavy = {'torch', 'transformers', 'numpy', 'datasets', 'scipy'} & set(sys.modules); "
        "print(took, sorted(heavy))"
    )
    times = []
    for _ in range(3):
        took, heavy = subprocess.check_output([sys.executable, "-c", code], text=True).split(" ", 1)
        assert heavy.strip() == "[]"
        times.append(float(took))
    print(f"import temper: {min(times):.3f} s (target 0.3)")
    assert min(times) < 3 * 0.3


def test_help_is_quick_and_names_every_command() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ended = shell("--help")
        times.append(time.perf_counter() - began)
    print(f"temper --help: {min(times):.3f} s (target 0.6)")
    assert min(times) < 3 * 0.6
    assert ended.code == 0
    for name in ("run", "plan", "report", "recipes", "new", "explain", "list", "schema", "doctor", "prune", "track"):
        assert re.search(rf"(?m)^  {name} ", ended.out), name


def test_version_and_wrong_flags(temper: Callable[..., Ended]) -> None:
    from temper import __version__

    assert temper("--version") == Ended(0, f"temper {__version__}\n", "")
    assert temper("run", *SMOKE, "--profil", "smoke").code == 2
    assert temper("nothing").code == 2
    assert temper("run").code == 2


@pytest.mark.parametrize(
    "command", ["run", "plan", "report", "recipes", "new", "explain", "list", "schema", "doctor", "prune", "track"]
)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0 and "--debug" in result.output


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_prints_its_own_lines_and_the_report_and_nothing_else(run_folder: Path) -> None:
    ended = shell("run", *SMOKE, "--out", run_folder, "--set", "threads=1", "--force", "sft", "compare")
    assert ended.code == 0
    assert ended.err == ""  # libraries warn into the log
    assert ended.out.rstrip().endswith(f"report: {run_folder / 'report' / 'index.html'}")
    assert "corpus: cached" in ended.out and "── sft (sft)" in ended.out and "── compare" in ended.out
    assert "Warning" not in ended.out
    assert "\x1b" not in ended.out  # no colours, no progress bars in a pipe
    said = [line for line in ended.out.splitlines() if not line.startswith("report:")]
    logged = (run_folder / "pipeline.log").read_text(encoding="utf-8")
    assert all(line in logged for line in said)
    assert (run_folder / "report" / "index.html").is_file()


def test_a_finished_run_is_cached_and_quiet_prints_the_path_alone(
    run_folder: Path, temper: Callable[..., Ended]
) -> None:
    ended = temper("run", *SMOKE, "--out", run_folder, "--set", "threads=1", "--quiet")
    assert ended == Ended(0, f"{run_folder / 'report' / 'index.html'}\n", "")
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert [e["name"] for e in manifest["stages"] if e["cached"]] == NAMES


@pytest.mark.parametrize(
    "flags", [["--stages", "news", "corpus"], ["--stages", "news,corpus"], ["--stages", "news", "--stages", "corpus"]]
)
def test_stages_are_chosen_in_every_spelling(flags: list[str], run_folder: Path, temper: Callable[..., Ended]) -> None:
    ended = temper("plan", *SMOKE, "--out", run_folder, *flags)
    assert ended.code == 0
    assert states(ended.out) == {"corpus": "cached", "tiny": "cached", "news": "cached"}  # news reads tiny's tokenizer


def test_wrong_choices_are_told(tmp_path: Path, temper: Callable[..., Ended]) -> None:
    out = ["--out", tmp_path / "x"]
    assert_short_error(temper("run", *SMOKE, *out, "--stages", "nwes"), "did you mean «news»?", "--stages")
    assert_short_error(temper("run", *SMOKE, *out, "--skip", "sfts"), "did you mean «sft»?")
    assert_short_error(temper("run", *SMOKE, *out, "--set", "sft.leraning_rate=1"), "sft.leraning_rate")
    assert_short_error(temper("run", "detox-sumarization", *out), "did you mean «detox-summarization»?")
    assert_short_error(temper("run", SMOKE[0], "--profile", "smok", *out), "did you mean «smoke»?")
    assert_short_error(temper("run", *SMOKE, "--config", "none.yaml", *out), "none.yaml")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_from_where_it_goes_on(number: int, code: int, run_folder: Path) -> None:
    words = ["run", *SMOKE, "--out", str(run_folder), "--set", "sft.max_steps=100000", "sft.checkpoint_every=1"]
    with subprocess.Popen(
        [*TEMPER, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        # a background job of a shell is started with Ctrl-C ignored, and so would be what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            until = time.monotonic() + 60
            while not list((run_folder / "sft.partial" / "checkpoints").glob("step-*")):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()  # or the test would wait for 100,000 steps
    assert process.returncode == code
    assert re.match(r"stopped.*: the same command goes on from step \d+ of stage sft\n", told), told
    assert "Traceback" not in told
    assert (run_folder / "tiny" / "stage.json").is_file() and (run_folder / "report" / "index.html").is_file()
    assert list((run_folder / "sft.partial" / "checkpoints").glob("step-*"))


# ── what a user does wrong ──────────────────────────────────────────────────────────────────────────────────────────


def rows_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _missing_file(folder: Path) -> tuple[list[str], list[str]]:
    return [f"news.source={folder}/rows.jsnol"], ["rows.jsnol", "there is no file"]


def _no_column(folder: Path) -> tuple[list[str], list[str]]:
    rows = rows_file(folder, '{"text": "a b c", "summary": "a"}\n{"text": "d e f", "sumary": "d"}\n')
    return [f"news.source={rows}", "news.take=null"], ["«summary»", "rows.jsonl:2"]


def _not_utf8(folder: Path) -> tuple[list[str], list[str]]:
    rows = rows_file(folder, '{"text": "é", "summary": "a"}\n'.encode("latin-1"))
    return [f"news.source={rows}", "news.take=null"], ["rows.jsonl", "encoding"]


def _nothing_left(folder: Path) -> tuple[list[str], list[str]]:
    return ["news.drop.longer_than=1"], ["no row is left of 120", "too long: 120", "loosen"]


def _no_weights(folder: Path) -> tuple[list[str], list[str]]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return [f"model={folder}/model"], ["holds no weights", "safetensors"]


def _no_folder(folder: Path) -> tuple[list[str], list[str]]:
    return [f"model={folder}/mdoel"], ["there is no folder", "mdoel"]


def _not_finite(folder: Path) -> tuple[list[str], list[str]]:
    return ["sft.lr=1e30", "sft.evaluate_every=99"], ["the loss of step 2 is nan", "mini:uk-news-dirty#", "lower lr"]


def _not_finite_at_validation(folder: Path) -> tuple[list[str], list[str]]:
    return ["sft.lr=1e30", "sft.evaluate_every=1"], ["the validation loss after step 1 is nan", "lower lr"]


def _long_prompt(folder: Path) -> tuple[list[str], list[str]]:
    return ["compare.decoding.max_new_tokens=319"], ["the context of base (320)", "mini:uk-news#", "max_new_tokens"]


@pytest.mark.parametrize(
    ("case", "stopped_at"),
    [
        (_missing_file, "news"), (_no_column, "news"), (_not_utf8, "news"), (_nothing_left, "news"),
        (_no_weights, "news"), (_no_folder, "news"), (_not_finite, "sft"),
        (_not_finite_at_validation, "sft"), (_long_prompt, "compare"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_few_lines_and_loses_nothing(
    case: Callable[[Path], tuple[list[str], list[str]]],
    stopped_at: str,
    run_folder: Path,
    tmp_path: Path,
    temper: Callable[..., Ended],
) -> None:
    sets, parts = case(tmp_path)
    words = ["run", *SMOKE, "--out", run_folder, "--set", "threads=1", *sets]
    ended = temper(*words)
    assert_short_error(ended, *parts)
    manifest = json.loads((run_folder / "manifest.json").read_text())
    status = {e["name"]: e["status"] for e in manifest["stages"]}
    assert status[stopped_at] == "failed"
    assert all((run_folder / name / "stage.json").is_file() for name in NAMES)
    assert (run_folder / "report" / "index.html").stat().st_mtime > (run_folder / "recipe.yaml").stat().st_mtime
    # as it was, everything is cached: nothing done was lost
    again = temper("run", *SMOKE, "--out", run_folder, "--set", "threads=1")
    assert again.code == 0 and again.out.count(": cached\n") == len(NAMES), again.out


def test_not_a_number_keeps_the_last_good_checkpoint(run_folder: Path, temper: Callable[..., Ended]) -> None:
    words = ["run", *SMOKE, "--out", run_folder, "--set", "threads=1", "sft.lr=1e30", "sft.checkpoint_every=1"]
    words += ["sft.evaluate_every=99"]
    ended = temper(*words)
    assert_short_error(ended, "The last good checkpoint is kept in")
    kept = Path(re.search(r"kept in (\S+)", ended.err).group(1))  # type: ignore[union-attr]
    assert [p.name for p in kept.glob("step-*")] == ["step-1"]


def test_a_hub_that_cannot_be_reached(run_folder: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    ended = shell("run", *SMOKE, "--out", run_folder, "--set", "model=some/model", **environment)
    assert_short_error(ended, "«some/model»", "hub cannot be reached", "folder")
    assert (run_folder / "corpus" / "stage.json").is_file()


def test_debug_shows_the_traceback_of_an_error(tmp_path: Path, temper: Callable[..., Ended]) -> None:
    for words in (["--debug", "new", "nothing"], ["new", "nothing", "--debug"]):
        ended = temper(*words)
        assert ended.code == 1 and "Traceback" in ended.err and "there is no recipe «nothing»" in ended.err


def test_lack_of_memory_and_of_rights_are_no_defects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temper: Callable[..., Ended]
) -> None:
    def full(folder: Path) -> list[doctor.Check]:
        raise MemoryError

    monkeypatch.setattr(doctor, "examine", full)
    assert_short_error(temper("doctor"), "not enough memory", "micro_tokens")
    (tmp_path / "file").touch()
    assert_short_error(temper("run", *SMOKE, "--out", tmp_path / "file" / "run"), "run folder", "--out")


def test_a_defect_is_told_as_one(monkeypatch: pytest.MonkeyPatch, temper: Callable[..., Ended]) -> None:
    def broken(folder: Path) -> list[doctor.Check]:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(doctor, "examine", broken)
    ended = temper("doctor")
    assert_short_error(ended, "defect of Temper", "ZeroDivisionError: by hand", "--debug")
    assert "Traceback" in temper("doctor", "--debug").err


# ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────────


def states(text: str) -> dict[str, str]:
    """stage → state in the table of `temper plan`."""
    return dict(re.findall(r"(?m)^([\w-]+) +(cached|runs|goes on|stops) ", text))


def test_plan_of_a_finished_run(run_folder: Path, temper: Callable[..., Ended]) -> None:
    before = sorted(p.relative_to(run_folder) for p in run_folder.rglob("*"))
    ended = temper("plan", *SMOKE, "--out", run_folder)
    assert ended.code == 0 and states(ended.out) == dict.fromkeys(NAMES, "cached")
    assert sorted(p.relative_to(run_folder) for p in run_folder.rglob("*")) == before


def test_plan_makes_no_folder(tmp_path: Path, temper: Callable[..., Ended]) -> None:
    ended = temper("plan", *SMOKE, "--out", tmp_path / "new")
    assert ended.code == 0 and states(ended.out) == dict.fromkeys(NAMES, "runs")
    assert "predictions" in ended.out and "no result yet" in ended.out
    assert not (tmp_path / "new").exists()


def test_plan_names_what_changed(run_folder: Path, temper: Callable[..., Ended]) -> None:
    ended = temper(
        "plan", *SMOKE, "--out", run_folder, "--set", "sft.lr=1e-3", "sft.adapter.r=8", "sft.keep_checkpoints=9"
    )
    assert states(ended.out) == dict.fromkeys(NAMES, "cached") | dict.fromkeys(AFTER_SFT, "runs")
    line = next(line for line in ended.out.splitlines() if line.startswith("sft runs: "))
    assert line == "sft runs: changed: lr 0.002 → 0.001, adapter.r 16 → 8"  # keep_checkpoints changes no result
    assert "before runs: its input changes: sft\n" in ended.out and "grpo runs: its input changes: sft\n" in ended.out
    assert "compare runs: its input changes: sft, grpo\n" in ended.out


def test_plan_knows_force_work_begun_and_results_set_aside(run_folder: Path, temper: Callable[..., Ended]) -> None:
    ended = temper("plan", *SMOKE, "--out", run_folder, "--force", "sft")
    assert states(ended.out)["sft"] == "runs" and "--force" in ended.out and states(ended.out)["compare"] == "cached"
    key = json.loads((run_folder / "sft" / "stage.json").read_text())["key"]
    (run_folder / "sft").rename(run_folder / f"sft@{key[:8]}")
    ended = temper("plan", *SMOKE, "--out", run_folder)
    assert states(ended.out)["sft"] == "cached" and "taken back" in ended.out
    shutil.rmtree(run_folder / f"sft@{key[:8]}")
    (run_folder / "sft.partial" / "checkpoints" / "step-4").mkdir(parents=True)
    write_sealed(run_folder / "sft.partial" / "partial.json", {"key": key})
    ended = temper("plan", *SMOKE, "--out", run_folder)
    assert states(ended.out)["sft"] == "goes on" and "from step 4" in ended.out


def test_plan_tells_what_would_stop_the_run(run_folder: Path, temper: Callable[..., Ended]) -> None:
    ended = temper("plan", *SMOKE, "--out", run_folder, "--set", "news.source=nowhere.csv")
    assert ended.code == 1 and states(ended.out)["news"] == "stops" and "there is no file nowhere.csv" in ended.out
    assert ended.err == ""


# ── the other commands ──────────────────────────────────────────────────────────────────────────────────────────────


def test_report_is_written_again_and_compares_runs(
    run_folder: Path, smoke_run: Path, tmp_path: Path, temper: Callable[..., Ended]
) -> None:
    shutil.rmtree(run_folder / "report")
    assert temper("report", run_folder) == Ended(0, f"report: {run_folder / 'report' / 'index.html'}\n", "")
    assert (run_folder / "report" / "results.json").is_file()
    other = shutil.copytree(run_folder, tmp_path / "second")
    ended = temper("report", run_folder, other, "--out", tmp_path / "both")
    assert ended.code == 0 and (tmp_path / "both" / "index.html").is_file()
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert len(results["runs"]) == 2
    assert_short_error(temper("report", tmp_path / "nothing"), "nothing")


def test_recipes_lists_what_is_shipped(temper: Callable[..., Ended]) -> None:
    ended = temper("recipes")
    assert re.search(r"detox-summarization +Summarise .* sft, before, grpo, compare +mini, smoke", ended.out)


def test_new_copies_a_recipe_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temper: Callable[..., Ended]
) -> None:
    from temper import recipe

    monkeypatch.chdir(tmp_path)
    ended = temper("new", "detox-summarization", "mine.yaml")
    assert ended.code == 0 and "temper run mine.yaml --profile mini" in ended.out
    mine, shipped = recipe.load("mine.yaml"), recipe.load("detox-summarization")
    assert mine.name == "mine" and {**mine.raw, "name": ""} == {**shipped.raw, "name": ""}
    Path("mine.yaml").write_text("precious")
    assert_short_error(temper("new", "detox-summarization", "mine.yaml"), "mine.yaml is there already")
    assert Path("mine.yaml").read_text() == "precious"
    assert temper("new", "detox-summarization").code == 0 and Path("detox-summarization.yaml").is_file()
    assert_short_error(temper("new", "detox-summarization", "no/such/folder.yaml"), "cannot be written")


def test_explain(temper: Callable[..., Ended]) -> None:
    ended = temper("explain", "sft.lr")
    assert ended.out == "lr: number, > 0\n  Peak learning rate.\n  in sft: default 0.0001\n"
    assert_short_error(temper("explain", "sft.lrr"), "did you mean «sft.lr»?")


def test_list(temper: Callable[..., Ended]) -> None:
    every = temper("list").out
    for kind, name in [
        ("losses", "nll"), ("metrics", "rougeL"), ("stages", "sft"), ("optimizers", "adamw"), ("schedules", "cosine"),
    ]:  # fmt: skip
        ended = temper("list", kind)
        assert ended.code == 0 and re.search(rf"(?m)^{name} +\S", ended.out)
        assert f"{kind}:\n{ended.out}" in every
    assert_short_error(temper("list", "metric"), "did you mean «metrics»?")


def test_schema_is_json(temper: Callable[..., Ended]) -> None:
    assert json.loads(temper("schema").out)["required"] == ["name", "stages"]


def test_prune_deletes_only_what_was_set_aside(run_folder: Path, temper: Callable[..., Ended]) -> None:
    assert temper("prune", run_folder) == Ended(0, "nothing is set aside here\n", "")
    for name in ("sft@12345678", "news.partial@12345678"):
        (run_folder / name).mkdir()
        (run_folder / name / "file").write_bytes(b"x" * 2500)
    assert_short_error(temper("prune", run_folder), "--yes")
    assert (run_folder / "sft@12345678").is_dir()
    ended = temper("prune", run_folder, "--yes")
    assert ended.code == 0 and re.search(r"sft@12345678 +2.5 kB", ended.out) and "deleted 2 folders, 5 kB" in ended.out
    assert sorted(p.name for p in run_folder.iterdir() if p.is_dir()) == sorted([*NAMES, "report"])
    assert_short_error(temper("prune", run_folder.parent), "no run folder")
    assert not (run_folder.parent / ".lock").exists()


def test_prune_keeps_away_from_a_run_at_work(run_folder: Path, temper: Callable[..., Ended]) -> None:
    (run_folder / "sft@12345678").mkdir()
    with open(run_folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_short_error(temper("prune", run_folder, "--yes"), "another process")
    assert (run_folder / "sft@12345678").is_dir()


# ── doctor ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doctor_finds_this_machine_fit_and_shows_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temper: Callable[..., Ended]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    ended = temper("doctor", tmp_path)
    assert ended.code == 0, ended.out
    assert "secret" not in ended.out + ended.err and re.search("hub token +there is one", ended.out)
    for name in ("Python", "packages", "memory", "bf16 on CPU", "disk", "rename", "lock", "sync"):
        assert re.search(rf"(?m)^(ok|note) +{name} ", ended.out), name
    assert not list(tmp_path.iterdir())  # what it tried is cleaned up
    assert_short_error(temper("doctor", tmp_path / "none"), "there is no folder")


def test_doctor_fails_where_a_package_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, temper: Callable[..., Ended]
) -> None:
    needs = ["no-such-package>=2", "numpy>=99", "pydantic>=1", "bitsandbytes>=9; extra == 'bnb'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    ended = temper("doctor")
    assert ended.code == 1
    assert re.search(r"(?m)^NO +no-such-package +not installed", ended.out)
    assert re.search(r"(?m)^NO +numpy +\S+, needs >=99", ended.out)
    assert "bitsandbytes" not in ended.out  # an extra that was not asked for


def test_doctor_tells_of_drives_that_copy_instead_of_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/sda / ext4 rw 0 0\ndrive /content/my\\040drive fuse.drive rw 0 0\nC: /mnt/c 9p rw 0 0\n"
    assert doctor.file_system(Path("/content/my drive/runs"), mounts) == "fuse.drive"
    assert doctor.file_system(Path("/mnt/c/x"), mounts) == "9p"
    assert doctor.file_system(Path("/mnt/cc"), mounts) == "ext4"
    found = {c.name: c for c in doctor.try_folder(tmp_path, "fuse.drive")}
    assert found["rename"].mark == doctor.HINT and "mounted drive" in found["rename"].text

    def copied(old: Path, new: Path) -> None:  # what such drives do
        shutil.copytree(old, new)
        shutil.rmtree(old)

    (tmp_path / "two").mkdir()
    monkeypatch.setattr(os, "rename", copied)
    found = {c.name: c for c in doctor.try_folder(tmp_path / "two", "fuse.drive")}
    assert found["rename"].mark == doctor.MISSING and "renaming makes a copy" in found["rename"].text


def test_doctor_on_a_folder_that_cannot_be_written() -> None:
    found = {c.name: c for c in doctor._folder(Path("/proc"))}
    assert found["writing"].mark == doctor.MISSING


# ── how it looks ────────────────────────────────────────────────────────────────────────────────────────────────────


def on_a_terminal(*words: object, columns: int = 80) -> str:
    """What a terminal of that width is sent."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES", "NO_COLOR"}}
    with subprocess.Popen(
        [*TEMPER, *map(str, words)], stdin=child, stdout=child, stderr=child,
        env={**environment, **ENVIRONMENT, "TERM": "xterm-256color"},
    ) as process:  # fmt: skip
        os.close(child)
        said = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # Linux says so when the last writer is gone
                break
            if not part:
                break
            said += part
    os.close(parent)
    assert process.returncode == 0
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["recipes", "list", "plan", "doctor"])
def test_tables_fit_a_terminal_of_80_columns(command: str, smoke_run: Path) -> None:
    words = {"plan": ["plan", *SMOKE, "--out", smoke_run, "--force", "sft"]}.get(command, [command])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_a_terminal(*words))
    table = [line for line in text.splitlines() if "  " in line and not line.startswith("  figures")]
    assert table and max(map(len, table)) <= 80
    assert "…" not in text.replace("{…}", "")  # nothing is cut off
    if command == "plan":
        assert states(text) == {**dict.fromkeys(NAMES, "cached"), "sft": "runs"}


def test_a_table_in_a_file_has_one_plain_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(["name", "what", "n"], [("a", "x" * 300, "1"), ("bb", "y", "22")], numbers=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "\x1b" not in "".join(lines)
    assert lines[2].split() == ["bb", "y", "22"] and lines[1].endswith(" 1")


def test_a_terminal_breaks_lines_between_words_and_never_a_path() -> None:
    path = "/a/long/path/to/some/report/index.html"
    text = f"warning: a sentence that is longer than a line\n\n  indented and longer than a line of thirty\n{path} is there"
    console = Console(file=io.StringIO(), force_terminal=True, width=30, color_system=None)
    terminal.show(console, Text(text))
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 30 or line == path for line in lines) and path in lines
    assert lines[2] == "" and lines[3:5] == ["  indented and longer than a", "  line of thirty"]
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    in_a_file = Console(file=io.StringIO(), force_terminal=False, width=30)
    terminal.show(in_a_file, Text(text))
    assert in_a_file.file.getvalue() == text + "\n"
