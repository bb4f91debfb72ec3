"""The application that the commands belong to, and options that several of them have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from temper import __version__
from temper.errors import RunError

if TYPE_CHECKING:
    from temper.pipeline import Choice

WORDS: list[str] = []  # of the command that is run
SEVERAL = {"--stages", "--skip", "--force", "--set", "--config", "--to"}  # options that take one value or several

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `temper recipes`.")]
Profile = Annotated[str | None, typer.Option(help="Merge this profile of the recipe over it.")]
Stages = Annotated[list[str] | None, typer.Option(metavar="STAGE …", help="Only these, and what they need.")]
Skip = Annotated[list[str] | None, typer.Option(metavar="STAGE …", help="Leave these out, and what reads them.")]
Force = Annotated[list[str] | None, typer.Option(metavar="STAGE …", help="Run these again; old results are set aside.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C …", help="Change a key, such as sft.lr=1e-4.")]
Overlays = Annotated[
    list[Path] | None, typer.Option("--config", metavar="FILE …", help="Merge files of the recipe's own shape over it.")
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; by default runs/NAME-PROFILE.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]  # read by `main`


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"temper {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Temper post-trains language models: one recipe, one command, one report."""


def chosen(stages: list[str] | None, skip: list[str] | None, force: list[str] | None) -> Choice:
    """The stages that `--stages`, `--skip` and `--force` name."""
    from temper.pipeline import Choice

    return Choice(only=names(stages), skip=names(skip), force=names(force))


def names(values: list[str] | None) -> list[str]:
    """Each value may itself be a list: «a b» or «a,b»."""
    return [name for value in values or [] for name in re.split(r"[,\s]+", value) if name]


def write_new(file: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        RunError: it is, or cannot be written.
    """
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise RunError(f"{file} is there already", do="name another file, or remove it first") from None
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}", do="name another file, or go where you may write") from None
