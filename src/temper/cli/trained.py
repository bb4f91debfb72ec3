"""Commands on models that were trained."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from temper import terminal
from temper.cli.base import Debug, app
from temper.errors import RecipeError, nearest

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A stage's folder, such as runs/NAME/sft, a model's, or a hub id.")]  # fmt: skip


@app.command()
def chat(
    model: ModelName,
    adapter: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="An adapter for /adapter to put on; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this probability together.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:  # fmt: skip
    """Talk with a model. /help inside says what can be done there."""
    from pydantic import ValidationError

    from temper import chat as chats
    from temper.rollouts.decoding import Decoding

    form = chats.form_of(model)
    if system is not None:
        form = form.model_copy(update={"system": system})
    try:
        decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg'][0].lower()}{first['msg'][1:]}", do="temper chat --help") from None  # fmt: skip
    talk = chats.opened(model, adapter or [], form=form, decoding=decoding, seed=seed, device=device)
    for notice in talk.notices:
        terminal.tell(notice, head="note")
    there = sys.stdin.isatty()
    if there:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited
        terminal.say(f"{model}: {talk.encoder.description}. /help says what can be done, Ctrl-D ends.")
    write = lambda text: (sys.stdout.write(text), sys.stdout.flush())  # noqa: E731
    told = lambda error: terminal.tell(error.what, error.where, error.do)  # noqa: E731
    chats.converse(talk, lambda: input("> " if there else ""), write, told)


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    format: Annotated[str, typer.Option(help="safetensors (transformers, vLLM) or gguf (llama.cpp, Ollama).")] = "safetensors",
    precision: Annotated[str | None, typer.Option(help="float32, bf16 or fp16; of gguf f32, f16 or q8_0.")] = None,
    apart: Annotated[bool, typer.Option("--apart", help="Keep an adapter an adapter, in PEFT's format.")] = False,
    licence: Annotated[str | None, typer.Option(help="For the model card; by default the base's own.")] = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write a model for other programs, with a model card. An adapter is folded in, but for virtual tokens."""
    from temper import export as exports

    known = {"safetensors": ("float32", "bf16", "fp16"), "gguf": ("f16", "f32", "q8_0")}
    if format not in known:
        raise RecipeError(f"there is no format «{format}»", do=nearest(format, known))
    if precision is not None and precision not in known[format]:
        raise RecipeError(f"{format} has no precision «{precision}»", do=f"choose {', '.join(known[format])}")
    how = {} if precision is None else {"packing": precision} if format == "gguf" else {"precision": precision}
    done = exports.export(model, out, kind=format, licence=licence, apart=apart, **how)  # type: ignore[arg-type]
    terminal.say(f"written: {done.path}\ncompared with what was trained: {done.compared}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `temper export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="A repository that is made can be seen by all.")] = False,
    debug: Debug = False,
) -> None:
    """Upload an exported model to the Hugging Face hub."""
    from temper import export as exports

    terminal.say(f"pushed: {exports.push(folder, repo, private=not public)}")


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Stages' folders, such as runs/NAME/sft, models', or hub ids; NAME=PATH gives a name.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter to serve under a name; may be repeated.")] = None,
    adapters_from: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Requests may load adapters that lie within; may be repeated.")] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Requests may have the base's weights read anew from models within --adapters-from.")] = False,
    host: Annotated[str, typer.Option(help="Where to listen. Others than this machine reach it only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The key that requests must bring; or the environment variable TEMPER_API_KEY.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Answers decoded together, per base.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Answers under way or waiting at most; more are refused with 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1024, metavar="BYTES", help="Size of a request at most.")] = 4 << 20,
    votes: Annotated[Path, typer.Option(metavar="FILE", help="Where verdicts of the playground are kept, in SQLite.")] = Path("votes.sqlite"),
    items: Annotated[str | None, typer.Option(metavar="SOURCE", help="Rows to be judged on the page: a file with prompts, such as runs/NAME/DATA/data/test.parquet.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of --items that are judged, drawn at random.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16, fp16 or auto: bf16 on a graphics card that has it.")] = "auto",
    debug: Debug = False,
) -> None:  # fmt: skip
    """Serve models and adapters behind OpenAI's protocol, and a page to compare them on."""
    try:
        from temper.serve import run
    except ImportError as error:
        raise RecipeError(f"serving needs a package that is not here: {error.name}", do="pip install 'temper-lm[serve]'") from None  # fmt: skip
    if precision not in (known := ("auto", "float32", "bf16", "fp16")):
        raise RecipeError(f"there is no precision «{precision}»", do=nearest(precision, known))
    named: dict[str, Path] = {}
    for given in adapter or []:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"--adapter {given}: an adapter needs a name", do="write --adapter NAME=PATH")
        if name in named:
            raise RecipeError(f"two adapters are called «{name}»", do="give each a name of its own")
        named[name] = Path(path)
    run.serve(
        models, adapters=named, adapters_from=adapters_from or [], reloads=reload, host=host, port=port, key=run.key_of(api_key_file),
        slots=slots, queue=queue, most=max_body, votes=votes, items=items, rows=rows, device=device, precision=precision,
        tell=lambda text: terminal.tell(text, head="note"), said=terminal.say,
    )  # fmt: skip
