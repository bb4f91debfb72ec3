"""YAML files and `a.b=c` assignments → one nested dictionary, every key of which remembers its file and line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from temper.errors import RecipeError, nearest

KeyPath = tuple[str, ...]


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` deeply over `below`: null deletes a key, a list replaces a list.

    >>> merge({"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"c": [3]}, "d": None, "e": 5})
    {'a': {'b': 1, 'c': [3]}, 'e': 5}
    """
    out = dict(below)
    for key, value in above.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            old = out.get(key)
            out[key] = merge(old if isinstance(old, dict) else {}, value)
        else:
            out[key] = value
    return out


def put(raw: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set one value in place, whatever stood there; null deletes the key.

    >>> raw = {"a": {"b": {"c": 1}}}
    >>> put(raw, ["a", "b"], {"d": 2}); put(raw, ["e", "f"], 3); raw
    {'a': {'b': {'d': 2}}, 'e': {'f': 3}}
    """
    *above, last = path
    for part in above:
        raw[part] = raw[part] if isinstance(raw.get(part), dict) else {}
        raw = raw[part]
    raw[last] = value
    if value is None:
        del raw[last]


def yaml() -> YAML:
    """YAML 1.2 that keeps order and refuses a key given twice."""
    yaml = YAML(typ="rt")
    yaml.version = (1, 2)
    yaml.width = 118
    yaml.allow_duplicate_keys = False
    return yaml


def read(path: Path, lines: dict[KeyPath, str], at: KeyPath) -> dict[str, Any]:
    """A YAML file as plain values; `lines` learns the file and line of every key below `at`.

    Raises:
        RecipeError: not UTF-8, not YAML, or no mapping at the top.
    """
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8 text", where=f"{path}, byte {error.start}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"not valid YAML: {error.problem}", where=f"{path}:{mark.line + 1 if mark else '?'}"
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping with name, model and stages", where=str(path))
    return plain(tree, path, lines, at)


def plain(node: Any, path: Path, lines: dict[KeyPath, str], at: KeyPath) -> Any:
    """ruamel's round-trip nodes → plain values, noting the line of every key on the way."""
    if isinstance(node, dict):
        out = {}
        for key, value in node.items():
            here = (*at, str(key))
            own = node.lc.data.get(key)  # type: ignore[attr-defined]  # None: it came by a merge key, «<<: *name»
            lines[here] = f"{path}:{(own[0] if own else node.lc.line) + 1}"  # type: ignore[attr-defined]
            out[str(key)] = plain(value, path, lines, here)
        return out
    if isinstance(node, list):
        return [plain(v, path, lines, (*at, str(i))) for i, v in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    raise RecipeError(f"a value of type {type(node).__name__} cannot stand in a recipe", where=lines.get(at, str(path)))


def move(lines: dict[KeyPath, str], old: KeyPath, new: KeyPath) -> None:
    for key in [k for k in lines if k[: len(old)] == old and len(k) > len(old)]:
        lines[new + key[len(old) :]] = lines.pop(key)


def assignment(text: str, raw: dict[str, Any], lines: dict[KeyPath, str], top: tuple[str, ...]) -> dict[str, Any]:
    """`sft.lr=1e-4` → {"stages": {"sft": {"lr": 1e-4}}}; `top` are the keys that are no stages."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise RecipeError(f"--set takes a.b=c, not «{text}»", where="--set")
    path = tuple(name.strip().split("."))
    if path[0] not in top:
        if path[0] not in raw.get("stages", {}):
            known = [*raw.get("stages", {}), *top]
            raise RecipeError(
                f"there is no stage or key «{path[0]}»", where=f"--set {text}", do=nearest(path[0], known)
            )
        path = ("stages", *path)
    try:
        parsed = plain(YAML(typ="rt").load(value), Path("--set"), {}, ())
    except MarkedYAMLError as error:
        raise RecipeError(f"not a YAML value: {error.problem}", where=f"--set {text}") from None
    for n in range(1, len(path) + 1):
        lines[path[:n]] = f"--set {text}"
    for key in reversed(path):
        parsed = {key: parsed}
    return parsed
