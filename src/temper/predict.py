"""What a stage would cost: from shapes, a quick measurement of this machine, and earlier results in the run folder.

Predictions, not promises: within a factor of two or so where the stage ran before, of three where only shapes are known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import psutil

from temper import address, hub, shapes
from temper.data import sources
from temper.engine import device as devices
from temper.engine.settings import Validated
from temper.errors import ModelError, TemperError
from temper.hub import bytes_to_fetch
from temper.recipe import Recipe
from temper.runfolder import Result, RunFolder, read_json
from temper.scaling import footprint
from temper.shapes import Rows, Size
from temper.stages.classifier import TrainClassifier
from temper.stages.data import Data
from temper.stages.evaluate import Evaluate
from temper.stages.generate import Generate
from temper.stages.merge import Merge
from temper.stages.pretrain import Pretrain
from temper.stages.reward import TrainReward
from temper.stages.rl import Rl
from temper.stages.space import grid
from temper.stages.sweep import Sweep

ROWS_PER_SECOND = 3000  # of a data stage: cleaned, split and checked for leaks
EFFICIENCY = 0.4  # of the measured matrix products that a whole step reaches
STEP_SECONDS = 0.002  # Python's share of decoding one token of a batch, and again for every layer
TRIALS_LOOKED_AT = 32  # of a sweep
LOAD_SECONDS = 2.0  # of any stage with a model: loading it and proving its layout


@dataclasses.dataclass(frozen=True)
class Cost:
    """None: cannot be told beforehand. `basis` says what a prediction stands on."""

    tokens: float | None = None
    seconds: float | None = None
    memory_bytes: float | None = None
    download_bytes: float | None = None
    disk_bytes: float | None = None
    basis: str = ""


class Predictor:
    """Predictions for the stages of one recipe. `known` takes finished stages: they tell more than shapes do."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.known = recipe, dict[str, Result]()
        self.earlier = list(_earlier(folder))
        self.floor = psutil.Process().memory_info().rss  # Python with torch, which this very process has imported
        self.device = devices.of(recipe)
        self._rows: dict[str, Rows | None] = {}
        self._sources: dict[str, hub.Source | None] = {}
        self.problems: dict[str, TemperError] = {}  # data stages that a look at their source shows to be wrong

    def cost(self, name: str) -> Cost:
        """The predicted cost of a stage that would run."""
        stage = self.recipe.stages[name]
        if isinstance(stage, Data):
            cost = self._data(name)
        elif isinstance(stage, Validated):  # not rl, whose cost is that of its samples
            cost = self._training(name, stage)
        elif isinstance(stage, Evaluate):
            cost = self._evaluation(name, stage)
        elif isinstance(stage, Merge):
            cost = self._merge(stage)
        elif isinstance(stage, Sweep):
            cost = self._sweep(stage)
        else:
            cost = self._as_before(name, stage)
        return dataclasses.replace(cost, download_bytes=self._download(name))

    def rows(self, ref: str) -> Rows | None:
        """Rows of a data stage, `STAGE` or `STAGE.SPLIT`."""
        name = ref.partition(".")[0]
        if name not in self._rows:
            stage = self.recipe.stages[name]
            self._rows[name] = None
            if name in self.known:
                self._rows[name] = shapes.rows_of_card(self.known[name], self._counter(name))
            elif isinstance(stage, Generate):
                self._rows[name] = _written(stage, self.rows(stage.data))
            elif isinstance(stage, Data):
                try:
                    self._rows[name] = shapes.rows_of_source(stage, self.recipe, self._counter(name))
                except TemperError as error:
                    self.problems[name] = error
        return self._rows[name]

    def _counter(self, name: str) -> shapes.Count | None:
        """Counts tokens as the model does that a data stage names, or else the first one that reads it."""
        stage: Any = self.recipe.stages[name]
        readers = [s for s in self.recipe.stages.values() if any(v.partition(".")[0] == name for _, _, v in s.refs())]
        named = [v for s in readers for _, gives, v in s.refs() if gives == "model"]
        for ref in [v for v in [getattr(stage, "tokenizer", None)] if v] or named:
            if (source := self._local(ref)) is not None:
                return shapes.counter(source, trust_remote_code=self.recipe.trust_remote_code)
        return None

    def _local(self, ref: str) -> hub.Source | None:
        """A model that is there already: a folder, a finished stage, or in the hub's cache."""
        name = str(self.recipe.model if ref == "base" else ref)
        if name in self.recipe.stages:
            stage: Any = self.recipe.stages[name]
            if name in self.known and (self.known[name].path / "model").is_dir():
                return hub.Source(str(self.known[name].path / "model"))
            below = stage.giver(self.recipe) if isinstance(stage, Sweep) else getattr(stage, "model", None)
            return self._local(below) if below else None
        return self._located(name)

    def _located(self, name: str) -> hub.Source | None:
        """A folder or a hub model; None where it cannot be had. Asked once: without a network that takes a while."""
        if name not in self._sources:
            self._sources[name] = None
            with contextlib.suppress(TemperError):
                found = hub.locate(name, self.recipe.folder)
                self._sources[name] = None if found.endpoint else found
        return self._sources[name]

    def size(self, ref: str) -> Size | None:
        """Size of a model that a stage, a folder or the hub gives."""
        name = str(self.recipe.model if ref == "base" else ref)
        stage: Any = self.recipe.stages.get(name)
        if isinstance(stage, Pretrain):
            return shapes.size_of_pretrained(stage)
        if stage is not None:
            if isinstance(stage, Sweep):
                return self.size(stage.giver(self.recipe) or "")
            return self.size(stage.model) if hasattr(stage, "model") else None
        source = self._located(name)
        with contextlib.suppress(OSError, ValueError):
            return source and shapes.size_of_source(source, trust_remote_code=self.recipe.trust_remote_code)
        return None

    def before(self, name: str) -> dict[str, Any] | None:
        """stage.json of an earlier result of this stage, else of another stage of its kind."""
        kind = self.recipe.stages[name].kind
        same = [i for i in self.earlier if i["kind"] == kind and i["seconds"]]
        return next((i for i in same if i["name"] == name), same[0] if same else None)

    def _data(self, name: str) -> Cost:
        rows, before = self.rows(name), self.before(name)
        if rows is None:
            told = "" if name in self.problems else "nothing: the source cannot be looked at from here"
            return Cost(basis=told)
        n, rate, basis = sum(rows.splits.values()), float(ROWS_PER_SECOND), rows.basis
        if before is not None and before["examples"]:
            rate = before["examples"] / before["seconds"]
            basis += f"; {rate:,.0f} rows/s of an earlier result"
        size = n * rows.tokens * shapes.CHARACTERS_PER_TOKEN
        return Cost(n * rows.tokens, n / rate, self.floor + 8 * size, None, size, basis)

    def _training(self, name: str, stage: Any) -> Cost:
        size, rows, before = self.size(name), self.rows(stage.data), self.before(name)
        if rows is None:
            return Cost(basis="nothing: its data are not known")
        used = rows.used(stage)
        n = stage.epochs * (getattr(stage, "pairs", None) or used)
        if stage.max_steps:
            n = stage.max_steps * stage.batch_size * stage.accumulation
        elif isinstance(stage, TrainReward) and stage.positive is not None:  # pairs: of half of the rows with the others
            n = stage.epochs * stage.pairs if stage.pairs else n / 2
        tokens = n * self.row_tokens(name, stage, rows)
        if size is None:
            return Cost(tokens, basis=f"{rows.basis}; the model is not known")
        adapter = getattr(stage, "adapter", None)
        trained = size.adapter(adapter) if adapter else size.parameters
        saved = 4 * trained * bool(adapter) + 4 * size.parameters * (adapter is None or getattr(stage, "merge", True))
        kept = 12 * trained * stage.keep_checkpoints + 4 * trained * stage.keep_best  # weights and two moments
        memory = self._held(stage, size, rows)
        if before is not None and before["tokens"] and before["parameters"]:
            every = size.parameters + trained * bool(adapter)
            if before["parameters"] >= every and memory is not None:
                memory = max(memory, before["peak_memory_bytes"] or 0)
            rate = before["tokens"] / before["seconds"] * before["parameters"] / every
            seconds, basis = tokens / rate, f"{rate:,.0f} tokens/s of an earlier result"
        else:
            precision = devices.precision(stage.precision, self.device)
            rate = shapes.matrix_rate(self.device, precision, stage.micro_tokens, size.hidden)
            flops = shapes.training_flops(
                size, scored=self.scored(stage, rows), adapter=bool(adapter),
                head_trained=adapter is None, width=max(stage.row_tokens, rows.tokens),
                recompute=stage.activation_checkpointing,
            )  # fmt: skip
            seconds = LOAD_SECONDS + tokens * flops / (EFFICIENCY * rate)
            basis = f"{rate / 1e9:,.0f} GFLOP/s measured here in {precision}"
        return Cost(tokens, seconds, memory, None, saved + kept, f"{basis}; {rows.basis}")

    def _held(self, stage: Any, size: Size, rows: Rows) -> float | None:
        """Memory of training with full micro-batches; None where shapes do not tell it."""
        launch, width = self.recipe.launch, min(stage.micro_tokens, rows.tokens)
        setting = footprint.setting_of(
            stage, launch.processes, width=width, scored=self.scored(stage, rows), row=None,
            precision=devices.precision(stage.precision, self.device), cards=self.device.type == "cuda",
        )  # fmt: skip
        parallel = launch.parallel if launch.processes > 1 else None
        with contextlib.suppress(ModelError):
            return self.floor + footprint.of(size.make, setting, parallel, launch.processes).total
        return None

    def scored(self, stage: Any, rows: Rows) -> float:
        """The share of tokens that go through the projection to the vocabulary, which a classifier does not have."""
        if isinstance(stage, TrainClassifier | TrainReward):
            return 0.0
        return 1.0 if isinstance(stage, Pretrain) else rows.answer / rows.tokens

    def row_tokens(self, name: str, stage: Any, rows: Rows) -> float:
        """Tokens of a row: counted where the stage ran on the same rows before, else estimated."""
        for info in self.earlier:
            config = info["config"]
            if info["name"] == name and config["data"] == stage.data and info["tokens"] and info["steps"]:
                return info["tokens"] / (info["steps"] * config["batch_size"] * config["accumulation"])
        return rows.tokens * (1 if getattr(stage, "positive", None) is None else 2)

    def _evaluation(self, name: str, stage: Evaluate) -> Cost:
        rows, before = self.rows(stage.data), self.before(name)
        if rows is None:
            return Cost(basis="nothing: its data are not known")
        n = min(rows.splits.get(stage.data.partition(".")[2] or "test", 0.0), stage.take or float("inf"))
        new = n * sum(way.max_new_tokens * way.beams for way in stage.ways.values()) * stage.samples
        tokens = len(stage.models) * (n * rows.tokens + new)
        sizes = [s for m in stage.models if (s := self.size(m)) is not None]
        memory = self.floor + 1.5 * max(4 * s.parameters for s in sizes) if sizes else None
        longest = max(way.max_new_tokens for way in stage.ways.values())
        disk = n * (4 * rows.tokens + 2 * longest * len(stage.entries))  # the first answer is kept
        if before is not None and before["examples"]:
            config = before["config"]
            ways = (config.get("decodings") or {"": config["decoding"]}).values()
            work = before["examples"] * len(config["models"]) * sum(w["max_new_tokens"] * w["beams"] for w in ways)
            work *= config.get("samples", 1)
            seconds = before["seconds"] * len(stage.models) * new / work
            return Cost(tokens, seconds, memory, None, disk, f"an earlier result; {rows.basis}")
        if len(sizes) < len(stage.models):
            return Cost(tokens, None, memory, None, disk, f"{rows.basis}; a model is not known")
        precision, seconds = devices.precision(stage.precision, self.device), 0.0
        for size in sizes:
            wide = shapes.matrix_rate(self.device, precision, 1024, size.hidden)
            narrow = shapes.matrix_rate(self.device, precision, stage.batch_size, size.hidden)
            seconds += LOAD_SECONDS + 4 * n * rows.tokens * size.matrices / (EFFICIENCY * wide)  # read, then scored
            seconds += 2 * new * (size.matrices + size.hidden * size.vocabulary) / (EFFICIENCY * narrow)
            seconds += new / stage.batch_size * STEP_SECONDS * (1 + size.layers)
        return Cost(tokens, seconds, memory, None, disk, f"matrix products measured here in {precision}; {rows.basis}")

    def _merge(self, stage: Merge) -> Cost:
        size = self.size(stage.model or stage.start or "base")
        if size is None:
            return Cost(basis="nothing: the model is not known")
        saved = 4 * size.parameters
        return Cost(None, LOAD_SECONDS + saved / 100e6, self.floor + 2.5 * saved, None, saved, "the model's size")

    def _sweep(self, stage: Sweep) -> Cost:
        """All trials: what each would cost by itself, at most, for what is shared or there already is taken."""
        n, points = stage.count(), grid(stage.space)
        points = points[:: 1 + len(points) // TRIALS_LOOKED_AT]
        each, names = list[Cost](), list[str]()
        for settings in points:
            trial = stage.trial_recipe(self.recipe, settings)
            inner = Predictor(trial, RunFolder(Path()))
            inner.known, inner.earlier, inner._rows = self.known, self.earlier, dict(self._rows)
            names = stage.affected(trial)
            with contextlib.suppress(TemperError):  # a trial that will fail takes next to nothing
                each += [inner.cost(name) for name in names]
        basis = f"{n} trials of {', '.join(names)}, at most: what is there already is taken"
        if unknown := next((c.basis for c in each if c.seconds is None), None):
            basis = f"{n} trials of {', '.join(names)}; {unknown}"

        def over(field: str) -> float | None:
            values = [getattr(c, field) for c in each]
            return None if None in values else sum(values) * n / len(points)

        memory = [c.memory_bytes for c in each]
        most = None if None in memory else max(m or 0.0 for m in memory)
        return Cost(over("tokens"), over("seconds"), most, None, over("disk_bytes"), basis)

    def _as_before(self, name: str, stage: Any) -> Cost:
        """What samples (rl, generate): from an earlier result of the same stage with the same model, by how much is asked."""
        info = next((i for i in self.earlier if i["name"] == name and i["kind"] == stage.kind and i["seconds"]), None)
        if info is None or info["config"]["model"] != getattr(stage, "model", None):
            return Cost(basis="nothing: how long its samples get is not known before it ran once")
        more, disk = self._ratio(name, stage, info), info["bytes_on_disk"]
        if more is None:
            return Cost(None, None, info["peak_memory_bytes"], None, disk, "an earlier result of another size")
        tokens = info["tokens"] and more * info["tokens"]
        return Cost(tokens, more * info["seconds"], info["peak_memory_bytes"], None, disk, "an earlier result")

    def _ratio(self, name: str, stage: Any, info: dict[str, Any]) -> float | None:
        """How many times as many samples a stage would take as an earlier result of it did; None: cannot be told."""
        if isinstance(stage, Generate):
            rows = self.rows(name)
            return sum(rows.splits.values()) / info["examples"] if rows and info["examples"] else None
        if not isinstance(stage, Rl):
            return None
        then, prompts = info["config"], stage.batch_size * stage.accumulation
        steps = stage.max_steps
        if steps is None and (rows := self.rows(stage.data)):
            steps = stage.epochs * rows.splits.get("train", 0.0) * stage.share / prompts
        if steps is not None and stage.kind == "warp":  # whose steps are of each policy of each round
            steps *= getattr(stage, "rounds", 1) * getattr(stage, "policies", 1)
        samples = then["batch_size"] * then["accumulation"] * then["completions"] * (info["steps"] or 0)
        before = samples * then["decoding"]["max_new_tokens"]
        return steps * prompts * stage.completions * stage.decoding.max_new_tokens / before if steps and before else None

    def _download(self, name: str) -> float | None:
        """Bytes still to come from the hub for one stage; None where that cannot be told."""
        stage = self.recipe.stages[name]
        wanted = []
        for _, gives, value in stage.refs():
            target = str(self.recipe.model if value == "base" else value)
            if gives != "data" and target not in self.recipe.stages and not address.endpoint(target):
                wanted.append((target.partition("@")[0], target.partition("@")[2] or None, "model", None))
        try:
            if isinstance(stage, Data) and sources.fingerprint(stage.source, self.recipe.folder) is None:
                wanted.append((stage.source, stage.revision, "dataset", stage.config))
        except TemperError:
            return None
        found = [
            0.0 if kind == "model" and (self.recipe.folder / repo).is_dir() else bytes_to_fetch(repo, revision, kind, part)
            for repo, revision, kind, part in wanted
        ]
        return None if any(f is None for f in found) else sum(f for f in found if f is not None)


def _written(stage: Generate, rows: Rows | None) -> Rows | None:
    """What a teacher writes of some rows: so many at most, of about that length."""
    if rows is None or stage.grow is not None:
        return rows and dataclasses.replace(rows, splits={"train": float(stage.grow or 0)})
    kept = {split: n for split, n in rows.splits.items() if split in (stage.splits or rows.splits)}
    most = float("inf") if stage.take is None else float(stage.take)
    return dataclasses.replace(rows, splits={split: min(n, most) for split, n in kept.items()})


def _earlier(folder: RunFolder) -> list[dict[str, Any]]:
    """stage.json of every finished stage in the folder, those set aside included, the present ones first."""
    out = []
    there = folder.path.glob("*/stage.json") if folder.path.is_dir() else []
    for path in sorted(there, key=lambda p: ("@" in p.parent.name, p)):
        with contextlib.suppress(OSError, ValueError):
            out.append(read_json(path))
    return out
