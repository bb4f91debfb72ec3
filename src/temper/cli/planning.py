"""The command that says what a run would do and cost, here or on machines that are elsewhere."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from temper import terminal
from temper.cli.base import Debug, Force, Out, Overlays, Profile, Sets, Skip, Stages, app, chosen, write_new
from temper.errors import RecipeError

if TYPE_CHECKING:
    from temper.plan import Step
    from temper.predict import Cost
    from temper.recipe import Recipe
    from temper.scaling.machines import Machines, Way

# Where no recipe is given: a model trained on full rows. `--set sft.…` changes how.
PLAIN = {"name": "plan", "stages": {"rows": {"stage": "data", "source": "rows.jsonl"}, "sft": {"stage": "sft", "data": "rows"}}}
CARD = (80.0, 989.0, 450.0, 50.0)  # an H100: GB, TFLOP/s in bf16, GB/s to others of its machine and to other machines
NAMES = [
    ("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimiser"), ("activations", "activations"),
    ("exchanged", "buckets, whole layers"),
]  # fmt: skip


@app.command()
def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a name from `temper recipes`.")
    ] = None,
    profile: Profile = None,
    stages: Stages = None,
    skip: Skip = None,
    force: Force = None,
    sets: Sets = None,
    config: Overlays = None,
    out: Out = None,
    machines: Annotated[int | None, typer.Option(min=1, help="Plan for so many machines.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Graphics cards of each machine.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder, its config.json, or a hub id; no weights needed.")] = None,
    memory: Annotated[float, typer.Option(min=1, help="GB of a card.")] = CARD[0],
    flops: Annotated[float, typer.Option(min=1, help="Its peak, TFLOP/s in bf16 without sparsity.")] = CARD[1],
    link: Annotated[float, typer.Option(min=0.1, help="GB/s of a card to others of its machine, one way.")] = CARD[2],
    network: Annotated[float, typer.Option(min=0.1, help="GB/s of a card to other machines, one way.")] = CARD[3],
    slurm: Annotated[bool, typer.Option("--slurm", help="Write NAME.slurm, a job file that runs the recipe there.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a run would do and cost, here or on many machines. The figures are predictions; only --slurm writes a file."""
    from temper import recipe as recipes

    if recipe is not None:
        recipes.find(recipe)  # a misspelt name is told before seconds of imports
    if machines is None and gpus is None:
        _here(recipe, profile, stages, skip, force, sets, config, out, asked=model is not None or slurm or (memory, flops, link, network) != CARD)
        return
    if recipe is None and (model is None or slurm):
        raise RecipeError(
            "nothing says what is to be trained", do="name a recipe" + (", for the job file runs one" if slurm else ", or a model: --model ORG/NAME")
        )
    from temper.scaling.machines import Machines

    target = Machines(machines or 1, gpus or 1, memory * 1e9, flops * 1e12, link * 1e9, network * 1e9)
    how: dict[str, Any] = {"overlays": config, "sets": sets, "overrides": {} if model is None else {"model": model}}
    if recipe is not None:
        loaded = recipes.load(recipe, profile=profile, **how)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "plan.yaml")
            file.write_text(json.dumps(PLAIN), encoding="utf-8")
            loaded = recipes.load(file, **how)
    _elsewhere(loaded, recipe is not None, target, chosen(stages, skip, force).wanted(loaded))
    if slurm:
        if force:
            raise RecipeError("--force would run its stages again whenever the job is queued again", do="leave it out of the job file")
        given = {"--profile": [profile] if profile else [], "--stages": stages, "--skip": skip, "--set": sets, "--config": config, "--out": [out] if out else []}  # fmt: skip
        words = [str(recipe), *(word for name, values in given.items() for v in values or [] for word in (name, str(v)))]
        _job(loaded, target, words)


def _here(
    recipe: str | None, profile: str | None, stages: list[str] | None, skip: list[str] | None, force: list[str] | None,
    sets: list[str] | None, config: list[Path] | None, out: Path | None, *, asked: bool,
) -> None:  # fmt: skip
    """The stages of a recipe on this machine."""
    if recipe is None or asked:
        raise RecipeError(
            "--model, --slurm and what describes a card are for plans beyond this machine" if asked else "no recipe is named",
            do="add --machines and --gpus" if asked else "temper plan RECIPE; or --model, --machines and --gpus",
        )
    from temper import app as runner
    from temper import plan as planning
    from temper import recipe as recipes

    loaded = recipes.load(recipe, profile=profile, overlays=config, sets=sets)
    folder = runner.folder_of(loaded, out)
    made = planning.make(loaded, folder, chosen(stages, skip, force))
    _show(loaded, folder, made, planning.total(made))
    if any(step.problem for step in made):
        raise typer.Exit(1)


def _show(recipe: Recipe, folder: Path, steps: Sequence[Step], total: Cost) -> None:
    rows = [(s.name, s.state, *_figures(s.cost)) for s in steps]
    if len(rows) > 1:
        rows.append(("all", "", *_figures(total)))
    terminal.say(f"{recipe.name}{f', profile {recipe.profile}' if recipe.profile else ''} → {folder}")
    terminal.table(["stage", "state", "tokens", "time", "memory", "download", "disk"], rows, numbers=5)
    terminal.say("")
    for step in steps:
        if step.reason:
            terminal.say(f"{step.name} {step.state}: {step.reason}")
        if step.cost.basis:
            terminal.say(f"  figures from {step.cost.basis}")
    if any(step.cost.basis for step in steps):
        terminal.say("\nThese figures are predictions: nothing was run. –: cannot be told beforehand.")
        if os.getloadavg()[0] > (os.cpu_count() or 1):
            terminal.say("This machine is busy with other work: the speed measured just now is lower than it can be.")


def _figures(cost: Cost) -> tuple[str, ...]:
    sizes = (cost.memory_bytes, cost.download_bytes, cost.disk_bytes)
    return (terminal.count(cost.tokens), terminal.duration(cost.seconds), *map(terminal.size, sizes))


def _elsewhere(recipe: Recipe, given: bool, target: Machines, names: Sequence[str]) -> None:
    """What each stage that trains a whole world of processes takes of a card."""
    from temper import plan as planning

    terminal.say(f"{target.machines} × {target.gpus} graphics cards of {terminal.size(target.memory)}")
    for found in planning.elsewhere(recipe, names, target, looked_at=given):
        s, size = found.setting, found.size
        what = f"{terminal.count(found.trained)} of {terminal.count(size.parameters)} parameters trained"
        terminal.say(f"\n{found.name}: {what}, {s.precision}, {s.optimizer}, activations {'computed again' if s.recompute else 'kept'}")
        terminal.say(f"{s.passes} × {s.tokens} tokens a card and step, examples of {s.width}, {s.scored:.0%} of them scored")
        _ways(found.ways, target, s.tokens * s.passes * found.busy)
        if found.busy < target.size:
            terminal.say(f"{target.size - found.busy} of {target.size} cards have nothing to do: a step has {found.busy} examples (batch_size × accumulation)")
        if recipe.stages[found.name].kind in ("rl", "warp"):
            terminal.say("the time of a step is that of training: sampling its completions comes on top")
        if not any(way.fits(target) for way in found.ways):
            terminal.say(f"none fits: {found.advice(target)}")
    for line in target.assumed:
        terminal.say(line)


def _ways(ways: Sequence[Way], target: Machines, tokens: int) -> None:
    def row(name: str, values: Sequence[str]) -> tuple[str, ...]:
        return (name, *values)

    rows = [row(name, [terminal.size(getattr(way.held, field)) for way in ways]) for field, name in NAMES]
    if any(way.cache for way in ways):
        rows.append(row("whole copy to sample", [terminal.size(way.copy) for way in ways]))
        rows.append(row("cache of samples", [terminal.size(way.cache) for way in ways]))
    rows.append(row("whole model, read at first", [terminal.size(way.held.start) for way in ways]))
    rows.append(row("at its fullest", [terminal.size(way.memory) for way in ways]))
    rows.append(row("fits", ["yes" if way.fits(target) else "no" for way in ways]))
    rows.append(row("computing", [f"{way.computing:.3g} s" for way in ways]))
    rows.append(row("exchange", [f"{way.exchanging:.3g} s" for way in ways]))
    rows.append(row("a step", [f"{way.seconds[0]:.3g} to {way.seconds[1]:.3g} s" for way in ways]))
    rows.append(row("tokens a second", [f"{terminal.count(tokens / way.seconds[1])} to {terminal.count(tokens / way.seconds[0])}" for way in ways]))
    terminal.table(["a card", *(way.name for way in ways)], rows, numbers=len(ways))


def _job(recipe: Recipe, target: Machines, words: Sequence[str]) -> None:
    from temper.scaling import slurm

    name = f"{recipe.name}-{recipe.profile}" if recipe.profile else recipe.name
    file = Path(f"{name}.slurm")
    write_new(file, slurm.job(file, name=name, machines=target.machines, gpus=target.gpus, words=words, folder=Path.cwd()))
    terminal.say(f"\nwrote {file}\nadd what your cluster asks for, then: sbatch {file}")
