"""What can stand in a recipe, for people (`temper explain`, `temper list`) and for editors (`temper schema`)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from temper import wording
from temper.errors import RecipeError, nearest
from temper.recipe import Top, read, shipped, stages
from temper.registry import Registry

# What takes options: {NAME: {option: value}}.
CONFIGURED = {
    "metric", "reward", "algorithm", "advantage", "pair loss", "preference loss", "unpaired loss", "merge rule", "schedule",
    "tracker",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field of a recipe. `path` begins with the stage's kind; top-level keys have a path of one.

    `preset`: what the field is where the mapping around it is left out (decoding is not greedy in every stage).
    """

    path: tuple[str, ...]
    info: FieldInfo
    preset: pydantic.BaseModel | None = None

    @property
    def type(self) -> str:
        return wording.bounded(self.info.annotation, self.info.metadata)

    @property
    def value(self) -> Any:
        """The default."""
        return (
            self.info.get_default(call_default_factory=True)
            if self.preset is None
            else getattr(self.preset, self.path[-1])
        )

    @property
    def default(self) -> str:
        return "required" if self.info.is_required() else f"default {_written(self.value)}"


def entries() -> list[Entry]:
    """Every field that a recipe can have, top level first."""
    found = [Entry((name,), info) for name, info in Top.model_fields.items()]
    for kind in stages:
        found += _below(stages.get(kind), (kind,))
    return found


def _below(
    model: type[pydantic.BaseModel], path: tuple[str, ...], preset: pydantic.BaseModel | None = None
) -> Iterator[Entry]:
    for name, info in model.model_fields.items():
        entry = Entry((*path, name), info, preset)
        yield entry
        for part in wording.models_within(info.annotation):
            inner = None if info.is_required() else entry.value
            yield from _below(part, (*path, name), inner if isinstance(inner, part) else None)


def explain(name: str) -> str:
    """What a field means: `lr`, `sft.lr`, `shape.hidden`, `seed`; or a kind of stage; or a metric, a reward, an algorithm.

    A stage may also be named as shipped recipes call it (`toxic_news.tries`), and `rl` by an algorithm (`grpo.lr`).

    Raises:
        RecipeError: there is no such field; offers the nearest.
    """
    wanted = tuple(name.removeprefix("stages.").split("."))
    if len(wanted) == 1 and wanted[0] in stages:
        return _stage(wanted[0])
    every = entries()
    found = [e for e in every if len(wanted) > 1 and e.path == wanted]
    found = found or [e for e in every if e.path[-len(wanted) :] == wanted]
    named = _named(name) if len(wanted) == 1 else []
    known = {".".join(e.path[k:]) for e in every for k in range(len(e.path))}
    if not found and len(wanted) > 1:  # of a stage that goes by a name of its own, or of an algorithm
        kinds, options = _kinds(wanted[0]), _options(wanted[0])
        found = [e for e in every if e.path[0] in kinds and e.path[1:] == wanted[1:]]
        named = [_thing(options[name], wanted[0])] if not found and name in options else []
        known |= {".".join((wanted[0], *e.path[1:])) for e in every if e.path[0] in kinds} | options.keys()
    if not found and not named:
        raise RecipeError(f"no field of a recipe is called «{name}»", do=_near(name, known, every))
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for e in found:
        field = ".".join(e.path[1:] or e.path)
        groups.setdefault((field, e.type, e.info.description or ""), []).append(e)
    explained = [_group(field, type_, text, members) for (field, type_, text), members in groups.items()]
    return "\n\n".join(explained + named)


def _kinds(name: str) -> set[str]:
    """Kinds of the stages that are called so in shipped recipes; of an algorithm, those that it trains in."""
    from temper.losses import policy_losses

    found = {"rl"} if name in policy_losses else set[str]()
    for file in shipped().values():
        raw = read(file)
        for part in (raw, *(raw.get("profiles") or {}).values()):
            kind = ((part.get("stages") or {}).get(name) or {}).get("stage")
            found |= {kind} if kind else set()
    return found


def _options(name: str) -> dict[str, Registry[Any]]:
    """`grpo.epsilon`, … → the table that the option's owner stands in."""
    tables = [table for table in _tables().values() if table.kind in CONFIGURED and name in table]
    return {f"{name}.{option}": table for table in tables for option in table.options(name)}


def _near(name: str, known: set[str], every: list[Entry]) -> str:
    """The nearest field; all there are would fill the screen."""
    offer = nearest(name, known | {n for table in _tables().values() for n in table})
    if offer.startswith("did"):
        return offer
    offer = nearest(name.rsplit(".", 1)[-1], {e.path[-1] for e in every})
    return offer if offer.startswith("did") else "`temper explain STAGE` lists a stage's fields: " + ", ".join(stages)


def _group(field: str, type_: str, text: str, members: list[Entry]) -> str:
    lines = [f"{field}: {type_}", f"  {text}"]
    if len(members[0].path) == 1:
        lines.append(f"  at the top of a recipe; {members[0].default}")
    else:
        by_default: dict[str, list[str]] = {}
        for e in members:
            by_default.setdefault(e.default, []).append(e.path[0])
        for default, kinds in by_default.items():
            lines.append(f"  in {', '.join(kinds)}: {default}")
    inside = [e for m in wording.models_within(members[0].info.annotation) for e in _inside(m, members[0])]
    lines += ["  its keys:"] * bool(inside)
    lines += [f"    {e.path[-1]} ({e.type}; {e.default}): {e.info.description or ''}" for e in inside]
    return "\n".join(lines)


def _inside(model: type[pydantic.BaseModel], around: Entry) -> list[Entry]:
    """The fields of a mapping, one level down."""
    return [e for e in _below(model, around.path, _instance(around, model)) if len(e.path) == len(around.path) + 1]


def _instance(entry: Entry, model: type[pydantic.BaseModel]) -> pydantic.BaseModel | None:
    value = None if entry.info.is_required() else entry.value
    return value if isinstance(value, model) else None


def _stage(kind: str) -> str:
    model = stages.get(kind)
    lines = [f"{kind}: {_first_line(model)}"]
    own = {name: place for place, name in enumerate(inspect.get_annotations(model))}

    def rank(field: tuple[str, FieldInfo]) -> tuple[bool, int]:
        """What must be given first, then what only this stage has, then what it shares with others."""
        return not field[1].is_required(), own.get(field[0], len(own))

    for name, info in sorted(model.model_fields.items(), key=rank):
        e = Entry((kind, name), info)
        lines.append(f"  {name} ({e.type}; {e.default})\n    {info.description or ''}")
    return "\n".join(lines)


def _named(name: str) -> list[str]:
    """What each metric, reward, algorithm or the like of this name is, with its options."""
    return [_thing(table, name) for table in _tables().values() if name in table]


def _thing(table: Registry[Any], name: str) -> str:
    lines = [f"{name}, {table.kind}: {_first_line(table.get(name))}"]
    for option, (type_, default) in table.options(name).items() if table.kind in CONFIGURED else ():
        given = "required" if default is inspect.Parameter.empty else f"default {_written(default)}"
        lines.append(f"  {option} ({wording.type_name(type_)}; {given}){_of_option(table.get(name), option)}")
    return "\n".join(lines)


def _of_option(thing: Any, option: str) -> str:
    """What the docstring says of one argument, on one line."""
    text = inspect.getdoc(thing) or ""
    found = re.search(rf"(?ms)^    {option}: (.*?)(?=^    \w|^\S|^\s*$|\Z)", text)
    return f": {' '.join(found[1].split())}" if found else ""


def _written(value: Any) -> str:
    """A default as it would stand in a recipe; of a mapping what differs from that mapping's own defaults."""
    if isinstance(value, pydantic.BaseModel):
        own = {name: info.get_default(call_default_factory=True) for name, info in type(value).model_fields.items()}
        given = {name: getattr(value, name) for name in own if getattr(value, name) != own[name]}
        return f"{{{', '.join(f'{name}: {_written(v)}' for name, v in given.items())}}}"
    return value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _tables() -> dict[str, Registry[Any]]:
    """All registries, by what `temper list` calls them."""
    import temper.stages  # noqa: F401  fills the registries
    from temper import metrics
    from temper.advantages import advantages
    from temper.engine import optim
    from temper.losses import pair_losses, policy_losses, preference_losses, token_losses, unpaired_losses
    from temper.merging import rules
    from temper.rewards import rewards
    from temper.trackers import trackers

    return {
        "stages": stages,
        "metrics": metrics.registry,
        "rewards": rewards,
        "algorithms": policy_losses,
        "advantages": advantages,
        "losses": token_losses,
        "rules": rules,
        "pair_losses": pair_losses,
        "preference_losses": preference_losses,
        "unpaired_losses": unpaired_losses,
        "optimizers": optim.optimizers,
        "schedules": optim.schedules,
        "trackers": trackers,
    }


def catalogue() -> dict[str, dict[str, str]]:
    """Kind → name → one line, of everything that a recipe can name."""
    from temper.data import mini

    listed = {kind: {name: _first_line(table.get(name)) for name in table} for kind, table in _tables().items()}
    return listed | {"data": {f"mini:{name}": text for name, text in mini.NAMES.items()}}


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file: stages by their kind, profiles as parts of a recipe."""
    kinds = {name: stages.get(name) for name in stages}
    made, shared = models_json_schema([(m, "validation") for m in kinds.values()], ref_template="#/$defs/{model}")
    defs = shared["$defs"]
    bodies = {n: defs.pop(made[(m, "validation")]["$ref"].rsplit("/", 1)[-1]) for n, m in kinds.items()}
    whole = {name: _with_kind(body, name) for name, body in bodies.items()}
    properties = Top.model_json_schema()["properties"]
    about = properties.pop("profiles")
    properties["stages"]["additionalProperties"] = _by_kind(whole)
    profile = _part({"type": "object", "properties": {k: v for k, v in properties.items() if k != "stages"}})
    parts = {"anyOf": [{"type": "null"}, *(_part(body) for body in whole.values())]}
    profile["properties"]["stages"] = {"type": "object", "additionalProperties": parts}
    properties["profiles"] = {**about, "additionalProperties": profile}
    defs |= {f"{name}-part": _part(body) for name, body in defs.items()}
    return _without_marks(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Temper recipe",
            "type": "object",
            "properties": properties,
            "required": ["name", "stages"],
            "additionalProperties": False,
            "$defs": defs,
        }
    )


def _with_kind(body: dict[str, Any], kind: str) -> dict[str, Any]:
    """A stage's schema with its key «stage»."""
    mark = {"const": kind, "description": body.get("description", "")}
    required = ["stage", *body.get("required", [])]
    return {**body, "properties": {"stage": mark, **body["properties"]}, "required": required}


def _by_kind(whole: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A kind must be named, and what else may stand follows from it."""
    rules = [
        {"if": {"properties": {"stage": {"const": name}}, "required": ["stage"]}, "then": body}
        for name, body in whole.items()
    ]
    return {"type": "object", "properties": {"stage": {"enum": list(whole)}}, "required": ["stage"], "allOf": rules}


def _part(node: Any) -> Any:
    """A schema of something to be merged over another: no key is required, and null deletes one."""
    if isinstance(node, list):
        return [_part(n) for n in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {**node, "$ref": node["$ref"] + "-part"}
    out = {k: v if k in {"default", "const", "enum"} else _part(v) for k, v in node.items() if k != "required"}
    if isinstance(node.get("properties"), dict):
        out["properties"] = {k: _nullable(k, _part(v)) for k, v in node["properties"].items()}
        out["additionalProperties"] = False
    return out


def _nullable(name: str, field: dict[str, Any]) -> dict[str, Any]:
    about = {k: field[k] for k in ("description", "default") if k in field}
    return field if name == "stage" else {**about, "anyOf": [{"type": "null"}, field]}


def _without_marks(node: Any) -> Any:
    """Without what only Temper reads."""
    if isinstance(node, list):
        return [_without_marks(n) for n in node]
    return {k: _without_marks(v) for k, v in node.items() if k != "affects_result"} if isinstance(node, dict) else node
