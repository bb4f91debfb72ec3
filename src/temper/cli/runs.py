"""Commands on recipes and runs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from temper import stopping, terminal
from temper.cli.base import (
    WORDS,
    Debug,
    Force,
    Out,
    Overlays,
    Profile,
    RecipeName,
    Sets,
    Skip,
    Stages,
    app,
    chosen,
    names,
    write_new,
)  # fmt: skip
from temper.errors import RecipeError, RunError, nearest


@app.command()
def run(
    recipe: RecipeName,
    profile: Profile = None,
    stages: Stages = None,
    skip: Skip = None,
    force: Force = None,
    sets: Sets = None,
    config: Overlays = None,
    out: Out = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the path of the report only.")] = False,
    debug: Debug = False,
) -> None:
    """Run a recipe and write its report. Stages that have a result are not run again."""
    from temper import recipe as recipes

    recipes.find(recipe)  # a misspelt name is told before seconds of imports
    with _stoppable() as work:
        from temper import app as runner
        from temper import launch
        from temper.manifest import command_line

        loaded = recipes.load(recipe, profile=profile, overlays=config, sets=sets)
        if launch.wanted(loaded):
            raise typer.Exit(launch.start(loaded, WORDS))
        work.append(runner.folder_of(loaded, out))
        runner.execute(loaded, work[0], choice=chosen(stages, skip, force), quiet=quiet, command=command_line())
    if not _main():
        return
    typer.echo(f"{work[0] / 'report' / 'index.html'}" if quiet else f"report: {work[0] / 'report' / 'index.html'}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN …", help="Run folders; several are compared.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write it.")] = None,
    debug: Debug = False,
) -> None:
    """Write a report again, or one of several runs."""
    from temper import report as reports

    typer.echo(f"report: {reports.build(runs, out)}")


@app.command()
def recipes(debug: Debug = False) -> None:
    """List the recipes that come with Temper."""
    from temper import recipe as recipes

    rows = []
    for name, path in recipes.shipped().items():
        raw = recipes.read(path)
        rows.append((name, raw.get("description", ""), ", ".join(raw["stages"]), ", ".join(raw.get("profiles", {}))))
    terminal.table(["recipe", "what it does", "stages", "profiles"], rows)


@app.command()
def new(
    recipe: RecipeName,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="By default NAME.yaml here.")] = None,
    debug: Debug = False,
) -> None:
    """Copy a recipe to a file of your own. An existing file is never overwritten."""
    from temper import recipe as recipes

    source = recipes.find(recipe)
    target = file or Path(f"{source.stem}.yaml")
    text = source.read_text(encoding="utf-8")
    if re.fullmatch(r"[\w-]+", target.stem):  # a name of its own keeps its runs apart from the shipped recipe's
        text = re.sub(r"(?m)^name:.*$", f"name: {target.stem}", text, count=1)
    write_new(target, text)
    profiles = recipes.read(source).get("profiles", {})
    tried = " --profile mini" if "mini" in profiles else ""
    typer.echo(f"wrote {target}\nedit it, then: temper run {target}{tried}")


@app.command()
def explain(
    field: Annotated[str, typer.Argument(metavar="FIELD", help="Such as lr, sft.lr, data.drop, seed, or rouge, grpo.")],
    debug: Debug = False,
) -> None:
    """Say what a field of a recipe means, or a metric, a reward, an algorithm."""
    import temper.stages  # noqa: F401  fills the registry
    from temper.fields import explain as explained

    terminal.say(explained(field))


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="stages, losses, metrics, …; all without.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List losses, metrics, stages and the like. All that a recipe can name."""
    from temper.fields import catalogue

    known = catalogue()
    if kind is not None and kind not in known:
        raise RecipeError(f"there is no list of «{kind}»", do=nearest(kind, known))
    for k, name in enumerate([kind] if kind else known):
        if kind is None:
            terminal.say(f"{chr(10) * (k > 0)}{name}:")
        terminal.table(["name", "what it is"], list(known[name].items()))


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    import temper.stages  # noqa: F401  fills the registry
    from temper.fields import schema as made

    typer.echo(json.dumps(made(), indent=1, ensure_ascii=False))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder that runs would be written to.")] = Path(),
    debug: Debug = False,
) -> None:
    """Say what this machine and a folder can do. Exits with 1 if something needed is missing."""
    from temper import doctor as doctors

    found = doctors.examine(folder)
    terminal.table(["", "what", "found"], [(check.mark, check.name, check.text) for check in found], fixed=2)
    if any(check.mark == doctors.MISSING for check in found):
        raise typer.Exit(1)


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Delete results that were set aside. A run folder keeps them as STAGE@KEY."""
    import shutil

    from temper.runfolder import RunFolder, size_of

    if not (folder / "manifest.json").is_file():
        raise RunError(f"{folder} is no run folder", do="name the folder that `temper run` wrote, such as runs/NAME")
    run_folder = RunFolder(folder)
    with run_folder.locked():
        aside = run_folder.aside()
        if not aside:
            typer.echo("nothing is set aside here")
            return
        sizes = [size_of(path) for path in aside]
        terminal.table(["set aside", "size"], [(p.name, terminal.size(n)) for p, n in zip(aside, sizes, strict=True)])
        if not yes:
            if not sys.stdin.isatty():
                raise RunError("nobody is there to ask", do="add --yes to delete them")
            if not typer.confirm(f"delete these {len(aside)} folders ({terminal.size(sum(sizes))})?"):
                return
        for path in aside:
            shutil.rmtree(path)
        typer.echo(f"deleted {len(aside)} folders, {terminal.size(sum(sizes))}")


@app.command()
def track(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[list[str] | None, typer.Option(metavar="NAME …", help="Trackers; by default its recipe's.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C …", help="An option, such as mlflow.url=http://….")
    ] = None,
    debug: Debug = False,
) -> None:
    """Send a run to trackers. What they have of it is not sent again."""
    from temper.job import Log
    from temper.tracking import start

    start.send(folder, start.chosen(folder, names(to), sets or []), Log(None))


class _Terminated(BaseException):
    """SIGTERM, as an exception: the manifest and the report are still written."""


@contextlib.contextmanager
def _stoppable() -> Iterator[list[Path]]:
    """Ctrl-C and SIGTERM end in a sentence and the exit codes 130 and 143. Yields a list to put the run folder in."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        if not stopping.ask():
            raise _Terminated("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, terminate)
    work: list[Path] = []
    try:
        yield work
    except KeyboardInterrupt:
        if _main():
            terminal.tell(_stopped_at(work), head="stopped")
        raise typer.Exit(130) from None
    except (_Terminated, stopping.Stopped):
        if _main():
            terminal.tell(_stopped_at(work), head="stopped by SIGTERM")
        raise typer.Exit(143) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _main() -> bool:
    """Whether this is the process that tells, of several."""
    return os.environ.get("RANK", "0") == "0"


def _stopped_at(work: list[Path]) -> str:
    """From where the same command would go on."""
    from temper.runfolder import progress, read_json

    try:
        entries = read_json(work[0] / "manifest.json")["stages"]
        stage = next(e["name"] for e in entries if e["status"] in {"failed", "pending"})
    except (OSError, ValueError, KeyError, IndexError, StopIteration):
        return "the same command starts again; finished stages stay"
    step, answered = progress(work[0] / f"{stage}.partial")
    if step:
        return f"the same command goes on from step {step} of stage {stage}"
    if answered:
        return f"the same command goes on with stage {stage}; the answers of {answered} of its models are kept"
    return f"the same command begins stage {stage} anew; finished stages stay"
