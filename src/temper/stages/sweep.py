"""sweep: the same stages with different settings, and which of them an evaluation scores best."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from temper import metrics, pipeline
from temper import recipe as recipes
from temper.errors import RecipeError, nearest
from temper.job import Job
from temper.recipe import Recipe, Stage, detail, replica, stages
from temper.stages import learning, trials
from temper.stages.evaluate import Evaluate
from temper.stages.space import Choices, Measure, Range, Settings, Space, grid
from temper.stages.study import Grid, Study

TOP = ("model", "seed")  # what can be varied at the top of a recipe
TRIALS = 20  # of random and tpe where the recipe does not say
CHECKED = 200  # combinations of a grid that are checked before anything runs; each value alone always is
Best = Literal["highest", "lowest"]


@stages.register("sweep")
class Sweep(Stage):
    """Train with different settings, and find the best of them by the score of an evaluation."""

    kind = "sweep"
    gives = "model"

    vary: dict[str, list[Any] | Range | Choices] = detail(
        ..., "STAGE.FIELD → its values: a list, {choices: […]} or {low: …, high: …, log: true}.", min_length=1
    )
    measure: str | list[str] = detail(
        ..., "STAGE.MODEL.METRIC of an evaluation; two of them for a front, such as reward and KL: the first decides."
    )
    best: Best | list[Best] | None = detail(
        None, "highest or lowest, one for each measure; null: highest, and lowest for a second measure."
    )
    curve: str | list[str] | None = detail(
        None,
        "Learning curves: the varied fields that the first measure is drawn over, such as sft.share (of the data) or "
        "sft.max_steps; a line for each combination of the others, and from where on more shows nothing.",
    )
    search: Literal["grid", "random", "tpe"] = detail(
        "grid", "grid: every combination; random or tpe: so many `trials`, proposed by Optuna (the extra `sweep`)."
    )
    trials: int | None = detail(None, "How many settings random or tpe try; null: 20. A grid tries all.", ge=1)
    storage: str | None = detail(
        None,
        "A study that several runs share: an SQLAlchemy URL such as sqlite:////shared/study.db.",
        affects_result=False,
    )
    model_of: str | None = detail(
        None, "The stage whose model of the best trial is this stage's; null: the measured model."
    )
    keep: Literal["best", "all"] = detail("best", "Of which trials the weights are kept.", affects_result=False)

    @property
    def space(self) -> Space:
        return {field: v.choices if isinstance(v, Choices) else v for field, v in self.vary.items()}

    @property
    def measures(self) -> list[Measure]:
        return [Measure.read(m) for m in ([self.measure] if isinstance(self.measure, str) else self.measure)]

    @property
    def directions(self) -> list[Best]:
        usual: list[Best] = ["highest", "lowest"]
        if self.best is None:
            return usual[: len(self.measures)]
        return self.best if isinstance(self.best, list) else [self.best]

    @property
    def curves(self) -> list[str]:
        return [self.curve] if isinstance(self.curve, str) else self.curve or []

    @property
    def measured(self) -> list[str]:
        """The evaluations that are asked for."""
        return list(dict.fromkeys(m.stage for m in self.measures))

    @model_validator(mode="after")
    def _sound(self) -> Sweep:
        ranges = [field for field, values in self.space.items() if isinstance(values, Range)]
        if self.search == "grid" and ranges:
            raise RecipeError(
                f"a grid needs the values of {ranges[0]}, not a range", where=f"vary.{ranges[0]}",
                do="give a list, or search: random or tpe",
            )  # fmt: skip
        if self.search == "grid" and (self.trials or self.storage):
            raise RecipeError(
                "a grid tries all its points in one run: trials and storage are for random and tpe", where="search",
                do="leave them out, or search: tpe",
            )  # fmt: skip
        if empty := [field for field, values in self.space.items() if values == []]:
            raise RecipeError(f"vary gives no value for {empty[0]}", where=f"vary.{empty[0]}", do="give at least one")
        learning.check(self.curves, self.space, self.search)
        if not 1 <= len(self.measures) <= 2 or len(set(self.measures)) != len(self.measures):
            raise RecipeError("a sweep has one measure or two different ones", where="measure", do="name one or two")
        if len(self.directions) != len(self.measures):
            raise RecipeError(
                f"best has {len(self.directions)} entries for {len(self.measures)} measures",
                where="best",
                do="one for each",
            )
        if self.search != "grid" and importlib.util.find_spec("optuna") is None:
            raise RecipeError(
                f"search: {self.search} needs Optuna, which is not installed", where="search",
                do="pip install 'temper-lm[sweep]', or search: grid",
            )  # fmt: skip
        return self

    # What of the recipe belongs to a trial

    def below(self, recipe: Recipe) -> list[str]:
        """All stages that the measures need, whatever values are tried, each after what it reads."""
        done: list[str] = []
        extra, recipe = self._named(recipe), self._trimmed(recipe)

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path or name in done:
                return
            stage = recipe.stages[name]
            own = stage.measured if isinstance(stage, Sweep) else recipes.dependencies(recipe, name)
            for other in [*own, *extra.get(replica(name)[0], [])]:
                visit(other, (*path, name))
            done.append(name)

        for name in self.measured:
            visit(name, ())
        return done

    def _asked(self, recipe: Recipe) -> dict[str, Any]:
        """Fields of the measured evaluations without the models that no measure needs: they would be trained and asked
        anew in every trial. The first model stays, for the others are compared with it."""
        out: dict[str, Any] = {}
        for name in self.measured:
            stage: Any = recipe.stages[name]
            needed = {stage.models[0], *(m.model for m in self.measures if m.stage == name)}
            if not needed >= set(stage.models) and f"{name}.models" not in self.vary:
                out[f"{name}.models"] = [m for m in stage.models if m in needed]
                out[f"{name}.expect"] = [e.model_dump() for e in stage.expect if e.model in needed]
        return out

    def _trimmed(self, recipe: Recipe) -> Recipe:
        trimmed = dict(recipe.stages)
        for field, value in self._asked(recipe).items():
            name, _, key = field.partition(".")
            if key == "models":
                trimmed[name] = trimmed[name].model_copy(update={key: value})
        return dataclasses.replace(recipe, stages=trimmed)

    def _named(self, recipe: Recipe) -> dict[str, list[str]]:
        """Stage → the stages that values tried in its fields name."""
        out: dict[str, list[str]] = {}
        for field, values in self.space.items():
            stage, _, name = field.partition(".")
            if isinstance(values, list) and stage in recipe.stages and "." not in name:
                refers = any(f == name for f, _, _ in recipe.stages[stage].refs())
                found = [str(v).partition(".")[0] for v in values] if refers else []
                out.setdefault(stage, []).extend(n for n in found if n in recipe.stages)
        return out

    def affected(self, recipe: Recipe) -> list[str]:
        """The stages of `below` that differ from trial to trial; the others are the run's own."""
        varied = {field.partition(".")[0] for field in self.vary}
        out: list[str] = []
        trimmed = self._trimmed(recipe)
        for name in self.below(recipe):
            stage = trimmed.stages[name]  # of another sweep what it measures: two could ask each other for ever
            reads = stage.measured if isinstance(stage, Sweep) else recipes.dependencies(trimmed, name)
            if varied & {*TOP, replica(name)[0]} or any(n in out for n in reads):
                out.append(name)
        return out

    def reads(self, recipe: Recipe) -> list[str]:
        affected = self.affected(recipe)
        return [name for name in self.below(recipe) if name not in affected]

    def trial_recipe(self, recipe: Recipe, settings: Settings) -> Recipe:
        return recipes.varied(recipe, {**self._asked(recipe), **settings}, self.measured)

    def within(self, recipe: Recipe, keys: dict[str, str]) -> dict[str, str]:
        """Keys of the measured stages with the first values: they change with whatever a trial depends on."""
        inner = self.keys(self.trial_recipe(recipe, grid(self.space)[0]), keys)
        return {name: inner[name] for name in self.measured}

    def keys(self, trial: Recipe, known: dict[str, str]) -> dict[str, str]:
        """Keys of all stages of a trial; `known` are those of the run's own stages."""
        affected = self.affected(trial)
        keys = {name: key for name, key in known.items() if name in trial.stages and name not in affected}
        for name in recipes.order(trial):
            if name not in keys:
                keys[name] = pipeline.key_of(trial, name, keys)
        return keys

    def check(self, recipe: Recipe) -> None:
        me = next(name for name, stage in recipe.stages.items() if stage is self)
        for field in self.vary:
            self._check_field(recipe, me, field)
        for measure in self.measures:
            self._check_measure(recipe, measure)
        below = self.below(recipe)
        if me in below:
            raise RecipeError(f"sweep «{me}» is measured by what reads its own result", do="measure another evaluation")
        affected = self.affected(recipe)
        for field in self.vary:
            if "." in field and field.partition(".")[0] not in below:
                raise RecipeError(
                    f"sweep «{me}» varies {field}, on which {' and '.join(self.measured)} do not depend",
                    do=f"vary a stage among {', '.join(below)}, or measure an evaluation that reads it",
                )
        for measure in self.measures:
            self._check_varies(recipe, measure, affected)
        if inner := [n for n in affected if isinstance(recipe.stages[n], Sweep)]:
            raise RecipeError(
                f"sweep «{me}» would run the sweep «{inner[0]}» in each trial", do="sweep over both at once"
            )
        self._check_model(recipe, me, affected)
        self._check_values(recipe)

    def _check_field(self, recipe: Recipe, me: str, field: str) -> None:
        stage, dot, _ = field.partition(".")
        known = [*recipe.raw.get("stages", {}), *TOP]
        if stage not in known or bool(dot) == (stage in TOP):
            offer = nearest(stage, known) if stage not in known else "write STAGE.FIELD, model or seed"
            raise RecipeError(f"sweep «{me}» varies «{field}», which is no field of this recipe", do=offer)

    def _check_measure(self, recipe: Recipe, measure: Measure) -> None:
        stage = recipe.stages.get(measure.stage)
        scored = [n for n, s in recipe.stages.items() if isinstance(s, Evaluate)]
        if not isinstance(stage, Evaluate):
            raise RecipeError(
                f"measure «{measure}»: there is no evaluation «{measure.stage}»",
                do=nearest(measure.stage, scored) if scored else "add a stage of kind evaluate",
            )
        given = {"model": (measure.model, stage.models), "metric": (measure.metric, metrics.names(stage.metrics))}
        for what, (name, there) in given.items():
            if name not in there:
                raise RecipeError(
                    f"measure «{measure}»: {measure.stage} has no {what} «{name}»", do=nearest(name, there)
                )

    def _check_varies(self, recipe: Recipe, measure: Measure, affected: Sequence[str]) -> None:
        """The model that is measured, or how it is measured, depends on what is varied."""
        read = [v.partition(".")[0] for _, gives, v in recipe.stages[measure.stage].refs() if gives != "model"]
        own = any(field.partition(".")[0] == measure.stage for field in self.vary)
        if not own and not {self._stage_of(recipe, measure.model), *read} & set(affected):
            raise RecipeError(
                f"measure «{measure}» is the same in every trial: nothing that is varied changes {measure.model}",
                do="measure a model that depends on what is varied",
            )

    def _stage_of(self, recipe: Recipe, model: str) -> str:
        return str(recipe.model if model == "base" else model)

    def giver(self, recipe: Recipe) -> str | None:
        """The stage whose model of the best trial is this stage's; None where no stage made it."""
        name = self.model_of or self._stage_of(recipe, self.measures[0].model)
        return name if name in recipe.stages else None

    def _check_model(self, recipe: Recipe, me: str, affected: Sequence[str]) -> None:
        if self.model_of is not None:
            givers = [n for n in affected if recipe.stages[n].gives == "model"]
            if self.model_of not in givers:
                raise RecipeError(
                    f"model_of: no stage «{self.model_of}» that is varied gives a model",
                    do=nearest(self.model_of, givers),
                )
        if self.giver(recipe) is None:
            readers = [n for n, s in recipe.stages.items() if any(value == me for _, _, value in s.refs())]
            if readers:
                raise RecipeError(
                    f"«{readers[0]}» reads the model of «{me}», which trains none", do="name it in model_of"
                )

    def _check_values(self, recipe: Recipe) -> None:
        """Every value of every field, and combinations of a grid, as the recipe itself is checked.

        Raises:
            RecipeError: the first that does not fit.
        """
        tried = {field: v if isinstance(v, list) else v.some() for field, v in self.space.items()}
        first = {field: values[0] for field, values in tried.items()}
        for field, values in tried.items():
            for value in values:
                self.trial_recipe(recipe, {**first, field: value})
        if self.search == "grid":
            for settings in grid(self.space)[:CHECKED]:
                self.trial_recipe(recipe, settings)

    # The work

    def run(self, job: Job) -> None:
        trials.run(job, self, self._search(job))

    def _search(self, job: Job) -> Grid | Study:
        if self.search == "grid":
            return Grid(self.space)
        return Study(
            self.space, self.directions, name=f"{job.recipe.name}.{job.name}.{trials.own_key(job)[:12]}",
            storage=self.storage, folder=job.dir, search=self.search, total=self.trials or TRIALS, seed=job.seed, say=job.say,
        )  # fmt: skip

    def count(self) -> int:
        """How many trials there will be."""
        return len(grid(self.space)) if self.search == "grid" else self.trials or TRIALS
