"""Rewards of completions: built-in ones, and any function in TRL's signature by `module:function`.

A recipe composes them with weights, and each is logged on its own:

    reward: [{toxicity: {invert: true}, weight: 0.7}, {rouge: {variant: rougeL}, weight: 0.3}]
    reward: [{"my_rewards:politeness": {}, weight: 1.0}]
    reward: [{model: {}, weight: 1.0}]          the stage's reward_model, on prompt and completion as one text

Adding one is a function of `Given` and its own keyword-only options, which returns one number a completion, or None
where it has nothing to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from temper.errors import DataError, RecipeError, TemperError, nearest
from temper.metrics.corpus import WordOrder, chrf
from temper.metrics.rouge import Variant, rouge
from temper.metrics.words import words
from temper.registry import Registry
from temper.types import Outputs, Record


@dataclasses.dataclass(frozen=True)
class Given:
    """What a reward looks at: N completions, each with the prompt and the row it answers."""

    prompts: Sequence[str]  # as the model was given them
    completions: Sequence[str]
    references: Sequence[str]  # "" where the row has no answer
    rows: Sequence[Record]
    ids: Sequence[Sequence[int]]  # token ids of the completions
    toxicity: Callable[[Sequence[str]], np.ndarray] | None = (
        None  # texts → probability [N], where there is a classifier
    )
    wholes: Sequence[str] = ()  # prompt and completion as one text, without special tokens
    scores: Callable[[Sequence[str]], np.ndarray] | None = None  # texts → rewards [N], where there is a reward model


Reward = Callable[..., Sequence[float | None]]
rewards: Registry[Reward] = Registry("reward")


@rewards.register("toxicity")
def toxicity(given: Given, *, invert: bool = False) -> list[float]:
    """Probability of «toxic» by the stage's classifier; inverted: 1 minus it."""
    assert given.toxicity is not None  # a recipe without a classifier is refused before
    found = given.toxicity(given.completions)
    return (1 - found if invert else found).tolist()  # type: ignore[no-any-return]


@rewards.register("model")
def model(given: Given) -> list[float]:
    """Reward of prompt and completion as one text, by the stage's reward model."""
    assert given.scores is not None  # a recipe without a reward model is refused before
    return given.scores(given.wholes).tolist()  # type: ignore[no-any-return]


@rewards.register("rouge")
def rouge_f(given: Given, *, variant: Variant = "rougeL", stem: bool = False) -> list[float]:
    """ROUGE F-measure against the row's answer."""
    return rouge(_outputs(given), variant=variant, stem=stem)[variant].rows.tolist()  # type: ignore[no-any-return]


@rewards.register("chrf")
def chrf_f(given: Given, *, word_order: WordOrder = 0) -> list[float]:
    """chrF against the row's answer, 0 to 1: characters in a row, and words where `word_order` is above 0."""
    return (chrf(_outputs(given), word_order=word_order)["chrf"].rows / 100).tolist()  # type: ignore[no-any-return]


def _outputs(given: Given) -> Outputs:
    return Outputs(list(given.prompts), list(given.completions), list(given.references), [True] * len(given.rows))


@rewards.register("length")
def length(given: Given, *, target: int) -> list[float]:
    """1 at `target` words, falling to 0 at none and at twice as many.

    >>> length(Given([""], ["one two three"], [""], [], []), target=4)
    [0.75]
    """
    return [max(0.0, 1 - abs(len(words(text)) - target) / target) for text in given.completions]


@rewards.register("regex")
def regex(given: Given, *, pattern: str, invert: bool = False) -> list[float]:
    """1 where the pattern is found in the completion, else 0; inverted: the other way round.

    >>> regex(Given(["", ""], ["42.", "none"], ["", ""], [], []), pattern=r"[0-9]+")
    [1.0, 0.0]
    """
    return [float(bool(re.search(pattern, text)) != invert) for text in given.completions]


@dataclasses.dataclass(frozen=True)
class Part:
    """One reward of a composition."""

    name: str
    weight: float
    call: Callable[[Given], Sequence[float | None]]


def read(spec: Sequence[Any], *, folder: Path | None = None) -> list[Part]:
    """A recipe's list of rewards, checked.

    Args:
        folder: where `module:function` is also looked for, beside the places Python knows; None: functions of the
            user's are not loaded yet, only their form is checked.

    Raises:
        RecipeError: an unknown reward or option, a function that cannot be found, two rewards of one name.
    """
    parts: list[Part] = []
    for entry in spec:
        name, options, weight = _entry(entry)
        if name in {p.name for p in parts}:
            raise RecipeError(f"the reward «{name}» stands twice", do="leave one; its weight says how much it counts")
        if ":" in name:
            parts.append(Part(name, weight, _users(name, options, folder)))
        else:
            if name not in rewards:
                known = [*rewards, "MODULE:FUNCTION"]
                raise RecipeError(f"there is no reward «{name}»", where="reward", do=nearest(name, known))
            checked = rewards.check(name, options, where="reward")
            _check_pattern(checked)
            parts.append(Part(name, weight, _bound(rewards.get(name), checked)))
    return parts


def _entry(entry: Any) -> tuple[str, dict[str, Any], float]:
    if isinstance(entry, str):
        return entry, {}, 1.0
    if isinstance(entry, dict):
        weight = entry.get("weight", 1.0)
        named = [k for k in entry if k != "weight"]
        options = entry[named[0]] if len(named) == 1 else None
        if len(named) == 1 and isinstance(options, dict | None) and isinstance(weight, int | float):
            return str(named[0]), dict(options or {}), float(weight)
        _check_keys(entry, [str(k) for k in named])
    raise RecipeError(
        f"{entry!r} is not a reward", where="reward", do="write {NAME: {option: value}, weight: 1.0}, or a name alone"
    )


def _check_keys(entry: dict[Any, Any], named: list[str]) -> None:
    """RecipeError that names the key which is neither the reward nor its weight, where one of them is clearly a reward."""
    rest = [k for k in named if k not in rewards and ":" not in k]
    names = [k for k in named if k not in rest]
    if len(names) != 1 or not rest:
        return
    options = list(rewards.options(names[0])) if names[0] in rewards else []
    close = nearest(rest[0], ["weight", *options])
    if option := next((o for o in options if f"«{o}»" in close), None):
        close = f"options stand within the reward: {{{names[0]}: {{{option}: …}}, weight: 1.0}}"
    raise RecipeError(f"unknown key «{rest[0]}» beside the reward «{names[0]}»", where="reward", do=close)


def _bound(function: Reward, options: dict[str, Any]) -> Callable[[Given], Sequence[float | None]]:
    return lambda given: function(given, **options)


def _check_pattern(options: dict[str, Any]) -> None:
    try:
        re.compile(options.get("pattern", ""))
    except re.error as error:
        raise RecipeError(
            f"«{options['pattern']}» is not a regular expression: {error}", where="reward", do="mend the pattern"
        ) from None


def _users(name: str, options: dict[str, Any], folder: Path | None) -> Callable[[Given], Sequence[float | None]]:
    """A function in TRL's signature: (prompts, completions, completion_ids, **columns) → one number a completion."""
    if options:
        raise RecipeError(f"«{name}» takes no options here", where="reward", do="write them into the function")
    function = load(name, folder) if folder is not None else None

    def call(given: Given) -> Sequence[float | None]:
        assert function is not None
        columns = {k: [r.row.get(k) for r in given.rows] for k in given.rows[0].row}
        prompts = columns.pop("prompt", list(given.prompts))
        columns.pop("completion", None)
        conversational = isinstance(prompts[0], list)  # then TRL gives completions as messages too
        texts = (
            [[{"role": "assistant", "content": t}] for t in given.completions] if conversational else given.completions
        )
        out = function(prompts=prompts, completions=list(texts), completion_ids=[list(i) for i in given.ids], **columns)
        return asyncio.run(out) if inspect.isawaitable(out) else out  # type: ignore[arg-type, no-any-return]

    return call


def load(name: str, folder: Path) -> Callable[..., Any]:
    """`module:function` from the recipe's folder or any place Python knows.

    Raises:
        RecipeError: there is no such module or function, or importing it failed.
    """
    module, _, attribute = name.partition(":")
    try:
        with _on_path(folder):
            spec = _own(module, folder)
            if spec is None:
                loaded = importlib.import_module(module)
            else:  # afresh: another recipe of this process may have a module of the same name
                loaded = importlib.util.module_from_spec(spec)
                assert spec.loader is not None
                spec.loader.exec_module(loaded)
            found = getattr(loaded, attribute, None)
    except Exception as error:
        raise RecipeError(
            f"the reward «{name}» cannot be loaded: {type(error).__name__}: {error}",
            where=f"looked in {folder} and in Python's own places",
            do=f"put {module}.py beside the recipe, or install its package",
        ) from None
    if not callable(found):
        raise RecipeError(f"module «{module}» has no function «{attribute}»", where="reward", do="check its name")
    return found  # type: ignore[no-any-return]


def _own(module: str, folder: Path) -> Any:
    """Where a module of the recipe's folder is found; None if it is not there."""
    return importlib.machinery.PathFinder.find_spec(module, [str(folder)]) if "." not in module else None


def source_hash(name: str, folder: Path) -> str:
    """SHA-256 of the file that holds a user's reward: part of the stage's key."""
    module = name.partition(":")[0]
    try:
        with _on_path(folder):
            spec = _own(module, folder) or importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The recipe's folder in Python's search path, and out of it again."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def compute(parts: Sequence[Part], given: Given) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weighted sum [N], and each reward by itself [N], unweighted; nan where there is none.

    A completion on which some rewards are silent (None) has the sum of the others; one on which all are is nan.

    Raises:
        DataError: a reward that raises, gives another number of values than there are completions, or nan.
    """
    each = {part.name: _values(part, given) for part in parts}
    table = np.stack(list(each.values()))  # [parts, N]
    weights = np.array([part.weight for part in parts])[:, None]
    total = np.where(np.isnan(table).all(axis=0), np.nan, np.nansum(table * weights, axis=0))
    return total, each


def _values(part: Part, given: Given) -> np.ndarray:
    n = len(given.completions)
    try:
        found = list(part.call(given))
    except TemperError as error:  # of the classifier or the reward model that is asked: it says itself what to do
        where, _ = _culprit(part, given, error)
        both = ", ".join(w for w in (error.where, where) if w)
        raise type(error)(error.what, where=both, do=error.do) from None
    except Exception as error:
        where, error = _culprit(part, given, error)
        raise DataError(
            f"the reward «{part.name}» raised {type(error).__name__}: {error}",
            where=where,
            do="mend the reward; what was trained until here is kept, and the same command goes on",
        ) from error
    if len(found) != n:
        raise DataError(
            f"the reward «{part.name}» gave {len(found)} values for {n} completions",
            where=f"the first row of the batch: {given.rows[0].where}",
            do="return one number (or None) for each completion, in their order",
        )
    out = np.array([_number(v) for v in found])
    bad = [k for k, v in enumerate(found) if v is not None and not np.isfinite(out[k])]
    if bad:
        raise DataError(
            f"the reward «{part.name}» gave {str(found[bad[0]])[:80]} for «{given.completions[bad[0]][:80]}»",
            where=given.rows[bad[0]].where,
            do="return a finite number, or None where there is none",
        )
    return out


def _number(value: Any) -> float:
    """A reward as a float; nan for None, and for what is no number."""
    try:
        return np.nan if value is None else float(value)
    except (TypeError, ValueError):
        return np.nan


def _culprit(part: Part, given: Given, error: Exception) -> tuple[str, Exception]:
    """The first row on which a reward raises by itself."""
    for k, record in enumerate(given.rows):
        one = Given(
            given.prompts[k : k + 1], given.completions[k : k + 1], given.references[k : k + 1], [record],
            given.ids[k : k + 1], given.toxicity, given.wholes[k : k + 1], given.scores,
        )  # fmt: skip
        try:
            part.call(one)
        except Exception as again:
            return f"{record.where}, completion «{given.completions[k][:80]}»", again
    return f"a batch of {len(given.rows)} completions, the first of {given.rows[0].where}", error
