"""A recipe: one YAML file → checked stages.

    file → profile merged over it → --config overlays → --set → checked against the stages' own fields

Merging is deep: null deletes a key, a list replaces a list, stages added by a profile come in the order written.
Every key remembers the file and line it came from, so that an error can name them.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.resources
import io
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from temper import overlay, references
from temper.errors import RecipeError, nearest
from temper.overlay import KeyPath
from temper.registry import Registry
from temper.trackers import Asked, Entry, asked
from temper.validation import validated
from temper.world import Launch

if TYPE_CHECKING:
    from temper.job import Job

REPLICA = "-seed"  # `sft` with seeds: 3 is trained as sft, sft-seed2 and sft-seed3


@dataclasses.dataclass(frozen=True)
class Ref:
    """Marks a field that names another stage: what the stage must give («model», «data», «classifier» or «reward»)."""

    gives: str


ModelRef = Annotated[str, Ref("model")]  # a stage, `base`, a folder, a hub id (id@revision) or an endpoint (URL#MODEL)
DataRef = Annotated[str, Ref("data")]  # STAGE or STAGE.SPLIT
ClassifierRef = Annotated[str, Ref("classifier")]  # a stage, a folder or a hub id
RewardRef = Annotated[str, Ref("reward")]  # a stage (of kind reward or classifier), a folder or a hub id


class Config(pydantic.BaseModel):
    """A part of a recipe: unknown keys are errors, every field has a description."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Stage(Config, abc.ABC):
    """A unit of work. Its fields are its keys in the recipe; `run` fills `job.dir`. `version` is raised by hand when the same
    settings would give other results. Fields that are declared with `affects_result=False` are left out of the key.
    """

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1
    gives: ClassVar[str] = ""  # «model», «data», «classifier», «reward» or nothing
    reads_split: ClassVar[str] = ""  # of its data, where the recipe names none
    trains_on: ClassVar[tuple[str, ...]] = ()  # splits of its data that a recipe may name; (): it does not train
    streams: ClassVar[bool] = False  # whether it trains on data that is read as a stream
    asks: ClassVar[tuple[str, ...]] = ()  # fields whose model may be an endpoint: only text is asked of it
    together: ClassVar[bool] = False  # all processes of a launch take part in it
    reads_replicas: ClassVar[bool] = False  # an evaluation also reads what `seeds: N` made of a model it names

    @abc.abstractmethod
    def run(self, job: Job) -> None: ...

    def check(self, recipe: Recipe) -> None:
        """What shows only in the whole recipe, told before anything runs: raises RecipeError."""

    def fingerprint(self, folder: Path) -> dict[str, Any]:
        """What outside the recipe decides the result (hashes of local files); part of the key."""
        return {}

    def reads(self, recipe: Recipe) -> list[str]:
        """Stages that it reads beside those its fields name."""
        return []

    def within(self, recipe: Recipe, keys: dict[str, str]) -> dict[str, str]:
        """Keys of stages of the recipe that it runs anew itself; part of its own key."""
        return {}

    def refs(self) -> Iterator[tuple[str, str, str]]:
        """(field, what it must give, value) for every reference to a model or to data."""
        for name, info in type(self).model_fields.items():
            marks = [m for m in info.metadata if isinstance(m, Ref)]
            value = getattr(self, name)
            if not marks:  # list[ModelRef] and `ModelRef | None` keep the mark inside
                marks = list(_marks_within(info.annotation))
            if marks and value is not None:
                for one in value if isinstance(value, list) else [value]:
                    yield name, marks[0].gives, one


def _marks_within(annotation: Any) -> Iterator[Ref]:
    for arg in getattr(annotation, "__args__", ()):
        for mark in getattr(arg, "__metadata__", ()):
            if isinstance(mark, Ref):
                yield mark
        yield from _marks_within(arg)


stages: Registry[type[Stage]] = Registry("stage")


def detail(default: Any, description: str, **more: Any) -> Any:
    """A field with a default and a description; `affects_result=False` keeps it out of the key."""
    extra = {"affects_result": False} if more.pop("affects_result", True) is False else None
    return Field(default, description=description, json_schema_extra=extra, **more)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `raw` is what was merged; `folder` is what relative paths are relative to."""

    name: str
    profile: str | None
    model: str | None
    seed: int
    device: str
    threads: int | None
    trust_remote_code: bool
    stages: dict[str, Stage]
    raw: dict[str, Any]
    folder: Path
    description: str = ""
    trackers: tuple[Asked, ...] = ()
    launch: Launch = Launch()  # noqa: RUF009  frozen

    def dump(self) -> str:
        out = io.StringIO()
        overlay.yaml().dump(self.raw, out)
        return out.getvalue()


class Top(Config):
    """The keys at the top of a recipe."""

    name: str = Field(description="Name of the recipe; the run folder is runs/NAME-PROFILE unless --out says otherwise.")
    description: str = detail("", "One or two sentences on what the recipe does.")
    model: str | None = detail(None, "The base model («base» in stages): a hub id (id@revision), a folder, or a stage.")
    seed: int = detail(20, "Seed of everything random: splits, order, initial adapters, sampling.")
    device: str = detail("auto", "auto, cpu, cuda, cuda:1 or mps. Not part of any key.")
    threads: int | None = detail(None, "CPU threads of torch; results are bit-equal only at equal numbers of threads.")
    trust_remote_code: bool = detail(False, "Run Python code that comes with a model. Off unless you trust its author.")
    launch: Launch = detail(Launch(), "Several processes: {processes: 2, parallel: ddp or fsdp}. Not part of any key.")
    trackers: list[Entry] = detail([], "Trackers that are shown the run: tensorboard, mlflow, wandb, clearml.")
    stages: dict[str, dict[str, Any]] = Field(description="The stages by name; each has «stage: KIND» and its fields.")
    profiles: dict[str, dict[str, Any]] = detail({}, "Named sets of overrides, merged over the recipe.")


def shipped() -> dict[str, Path]:
    """Recipes that come with Temper: name → file."""
    folder = Path(str(importlib.resources.files("temper") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe given by path or by shipped name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise RecipeError(f"there is no recipe file {name}", do="give a path to a YAML file, or a name from `temper recipes`")
    known = shipped()
    if name not in known:
        raise RecipeError(f"there is no recipe «{name}»", do=nearest(name, known))
    return known[name]


def read(path: Path) -> dict[str, Any]:
    """A recipe's file as it stands: nothing merged, nothing checked but its syntax."""
    return overlay.read(path, {}, ())


def load(
    name: str | Path,
    *,
    profile: str | None = None,
    overlays: list[Path] | None = None,
    sets: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name: a file or a shipped name.
        profile: which of `profiles` to merge over it.
        overlays: YAML files of the recipe's own shape, merged in turn; each may extend the chosen profile too.
        sets: `a.b=c` assignments; `sft.lr=1e-4` is short for `stages.sft.lr=1e-4`.
        overrides: a nested dictionary of the recipe's own shape, merged last (for use from Python).

    Raises:
        RecipeError: an unknown key, profile or name (with the nearest known one and its line), a wrong type.
    """
    path = find(str(name))
    lines: dict[KeyPath, str] = {(): str(path)}
    raw = overlay.read(path, lines, ())
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(p, dict | None) for p in profiles.values()):
        raise RecipeError(
            "profiles are mappings: name → parts of the recipe",
            where=lines.get(("profiles",), str(path)),
            do="see docs/recipes.md",
        )
    if profile is not None:
        if profile not in profiles:
            raise RecipeError(
                f"recipe {path.name} has no profile «{profile}»",
                where=str(path),
                do=nearest(profile, profiles) if profiles else "it has none: leave --profile out",
            )
        overlay.move(lines, ("profiles", profile), ())
        raw = overlay.merge(raw, profiles[profile] or {})
    for file in overlays or []:
        if not file.is_file():
            raise RecipeError(f"there is no file {file}", where="--config", do="check the path")
        extra = overlay.read(file, lines, ())
        own = (extra.pop("profiles", None) or {}).get(profile)
        raw = overlay.merge(overlay.merge(raw, extra), own or {})
    for text in sets or []:
        raw = overlay.merge(raw, overlay.assignment(text, raw, lines, tuple(Top.model_fields)))
    if overrides:
        raw = overlay.merge(raw, overrides)
    return _checked(raw, lines, path, profile)


def varied(recipe: Recipe, values: dict[str, Any], need: Sequence[str]) -> Recipe:
    """The recipe with other values in some fields, and only the stages `need` with what they read.

    Args:
        values: `sft.lr` or `seed` → its value; null is the field's default.

    Raises:
        RecipeError: as `load`: no such field, a value that does not fit, stages that do not go together.
    """
    raw, lines = deepcopy(recipe.raw), dict[KeyPath, str]()
    for field, value in values.items():
        path = field.split(".")
        overlay.put(raw, path if len(path) == 1 else ["stages", *path], value)
    file = recipe.folder / "recipe.yaml"
    whole = _built(raw, lines, file, recipe.profile)
    kept: set[str] = set()

    def visit(name: str) -> None:
        if name not in kept:
            kept.add(name)
            for other in dependencies(whole, name):
                visit(other)

    for name in need:
        visit(name)
    families = {replica(name)[0] for name in kept} | kept
    part = dataclasses.replace(
        whole,
        stages={n: s for n, s in whole.stages.items() if n in kept},
        raw={**raw, "stages": {n: config for n, config in raw["stages"].items() if n in families}},
    )
    references.check(part, lines, file)
    order(part)
    return part


def _checked(raw: dict[str, Any], lines: dict[KeyPath, str], path: Path, profile: str | None) -> Recipe:
    recipe = _built(raw, lines, path, profile)
    references.check(recipe, lines, path)
    order(recipe)
    return recipe


def _built(raw: dict[str, Any], lines: dict[KeyPath, str], path: Path, profile: str | None) -> Recipe:
    """The stages of a merged recipe, each checked by itself."""
    top = validated(Top, raw, (), lines)
    built: dict[str, Stage] = {}
    for name, config in top.stages.items():
        at = ("stages", name)
        where = lines.get(at, str(path))
        if not name.replace("_", "").replace("-", "").isalnum() or name in {"base", "report", "trackers"}:
            raise RecipeError(
                f"«{name}» cannot be the name of a stage",
                where=where,
                do="use letters, digits, - and _; «base», «report» and «trackers» are taken",
            )
        if "stage" not in config:
            raise RecipeError(f"stage «{name}» has no «stage:» key", where=where, do="kinds: " + ", ".join(stages))
        kind = stages.get(str(config["stage"]), where=lines.get((*at, "stage"), where))
        values = {k: v for k, v in config.items() if k != "stage"}
        stage = validated(kind, values, at, lines, also=("stage",), others=stages)
        for copy in range(getattr(stage, "seeds", 1)):
            built[f"{name}{REPLICA}{copy + 1}" if copy else name] = stage
    kept = ("name", "model", "seed", "device", "threads", "trust_remote_code", "description", "launch")
    return Recipe(
        **{k: getattr(top, k) for k in kept},
        trackers=asked(top.trackers, lines, str(path)),
        profile=profile,
        stages=built,
        raw=raw,
        folder=path.resolve().parent,
    )


def dependencies(recipe: Recipe, name: str) -> list[str]:
    """Stages that stage `name` reads, the one that stands for `base` included."""
    found: list[str] = []
    for _, _, value in recipe.stages[name].refs():
        target = recipe.model if value == "base" else value
        for candidate in (target, (target or "").partition(".")[0]):
            if candidate in recipe.stages and candidate not in found:
                found.append(candidate)
                if recipe.stages[name].reads_replicas:
                    found += [n for n in recipe.stages if replica(n) != (n, 0) and replica(n)[0] == candidate]
    return found + [n for n in recipe.stages[name].reads(recipe) if n not in found]


def replica(name: str) -> tuple[str, int]:
    """The stage that `seeds: N` copied, and which copy: sft → (sft, 0), sft-seed2 → (sft, 1)."""
    stem, mark, number = name.rpartition(REPLICA)
    return (stem, int(number) - 1) if mark and number.isdigit() else (name, 0)


def order(recipe: Recipe) -> list[str]:
    """Stage names so that each comes after what it reads, otherwise as written."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " → ".join([*path[path.index(name) :], name])
            raise RecipeError(
                f"stages read one another in a circle: {circle}", do="let one of them read another stage, or the base"
            )
        if name not in done:
            for needed in dependencies(recipe, name):
                visit(needed, (*path, name))
            done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done


def seed_of(recipe: Recipe, name: str) -> int:
    """The seed of a stage: the recipe's, moved for the replicas that `seeds: N` makes."""
    return recipe.seed + 1000 * int(replica(name)[1])
