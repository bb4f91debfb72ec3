"""What can stand in a recipe, for people (`temper explain`, `temper list`) and for editors (`temper schema`)."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from temper import wording
from temper.errors import RecipeError, nearest
from temper.recipe import Top, stages


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field of a recipe. `path` begins with the stage's kind; top-level keys have a path of one."""

    path: tuple[str, ...]
    info: FieldInfo

    @property
    def type(self) -> str:
        return wording.bounded(self.info.annotation, self.info.metadata)

    @property
    def default(self) -> str:
        return (
            "required"
            if self.info.is_required()
            else f"default {_written(self.info.get_default(call_default_factory=True))}"
        )


def entries() -> list[Entry]:
    """Every field that a recipe can have, top level first."""
    found = [Entry((name,), info) for name, info in Top.model_fields.items()]
    for kind in stages:
        found += _below(stages.get(kind), (kind,))
    return found


def _below(model: type[pydantic.BaseModel], path: tuple[str, ...]) -> Iterator[Entry]:
    for name, info in model.model_fields.items():
        yield Entry((*path, name), info)
        for part in wording.models_within(info.annotation):
            yield from _below(part, (*path, name))


def explain(name: str) -> str:
    """What a field means: `lr`, `sft.lr`, `shape.hidden`, `seed`; or a kind of stage.

    Raises:
        RecipeError: there is no such field; offers the nearest.
    """
    wanted = tuple(name.removeprefix("stages.").split("."))
    if len(wanted) == 1 and wanted[0] in stages:
        return _stage(wanted[0])
    every = entries()
    found = [e for e in every if len(wanted) > 1 and e.path == wanted]
    found = found or [e for e in every if e.path[-len(wanted) :] == wanted]
    if not found:
        known = {".".join(e.path[k:]) for e in every for k in range(len(e.path))}
        raise RecipeError(f"no field of a recipe is called «{name}»", do=_near(name, known, every))
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for e in found:
        field = ".".join(e.path[1:] or e.path)
        groups.setdefault((field, e.type, e.info.description or ""), []).append(e)
    return "\n\n".join(_group(field, type_, text, members) for (field, type_, text), members in groups.items())


def _near(name: str, known: set[str], every: list[Entry]) -> str:
    """The nearest field; all there are would fill the screen."""
    offer = nearest(name, known)
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
    parts = [n for m in wording.models_within(members[0].info.annotation) for n in m.model_fields]
    return "\n".join(lines + ([f"  its keys: {', '.join(parts)}"] if parts else []))


def _stage(kind: str) -> str:
    model = stages.get(kind)
    lines = [f"{kind}: {_first_line(model)}"]
    for name, info in model.model_fields.items():
        e = Entry((kind, name), info)
        lines.append(f"  {name} ({e.type}; {e.default})\n    {info.description or ''}")
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A default as it would stand in a recipe."""
    if isinstance(value, pydantic.BaseModel):
        return "{}"
    return value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def catalogue() -> dict[str, dict[str, str]]:
    """Kind → name → one line, of everything that a recipe can name."""
    import temper.stages  # noqa: F401  fills the registries
    from temper import metrics
    from temper.data import mini
    from temper.engine import optim
    from temper.losses import token_losses

    return {
        "stages": {name: _first_line(stages.get(name)) for name in stages},
        "losses": {name: _first_line(token_losses.get(name)) for name in token_losses},
        "metrics": metrics.describe(),
        "optimizers": {name: _first_line(optim.optimizers.get(name)) for name in optim.optimizers},
        "schedules": {name: _first_line(optim.schedules.get(name)) for name in optim.schedules},
        "data": {f"mini:{name}": text for name, text in mini.NAMES.items()},
    }


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
