"""The shape of the package: who may import whom, no circles, nothing public without a sentence, no file too long."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import temper
from temper.engine import optim
from temper.losses import preference_losses, token_losses, unpaired_losses
from temper.merging import rules
from temper.metrics import registry as metrics
from temper.recipe import stages
from temper.trackers import trackers

SOURCE = Path(temper.__file__).parent

# Each may import what stands above it, and files of its own folder.
ORDER = [
    "errors", "types", "wording", "stopping", "world", "registry", "address", "overlay", "validation", "trackers", "references", "recipe", "runfolder",
    "hub", "terminal", "manifest", "job", "pipeline",
    "trees", "data", "models", "losses", "advantages", "merging", "metrics", "rewards", "statistics", "rollouts", "engine", "stages",
    "shapes", "scaling", "predict", "plan", "report", "tracking", "launch", "app", "chat", "serve", "export", "fields", "doctor", "cli", "__main__",
]  # fmt: skip
# Where less is allowed than the order says.
ONLY = {
    "types": set(),
    "wording": set(),
    "registry": {"errors", "wording"},
    "address": {"errors"},
    "trees": set(),
    "data": {"errors", "types", "recipe"},
    "losses": {"errors", "registry"},
    "advantages": {"registry"},
    "merging": {"errors", "registry"},
    "rewards": {"errors", "metrics", "registry", "types"},
    "metrics": {"data", "errors", "registry", "types"},  # data: the insults of the mini sets
    "statistics": {"types"},
    "rollouts": {"errors", "address", "recipe", "models", "trees"},
    "report": {"errors", "statistics", "types"},  # reads run folders alone; nothing that trains calls it
    "terminal": set(),
    "trackers": {"errors", "overlay", "registry"},  # know no run folder
    "tracking": {"errors", "job", "overlay", "runfolder", "trackers"},  # reads run folders alone, as the report does
}
NO_TORCH = {"errors", "stopping", "world", "types", "wording", "registry", "address", "overlay", "validation", "trackers", "references", "recipe", "runfolder", "hub", "manifest", "job", "pipeline", "data",
            "advantages", "metrics", "rewards", "statistics", "report", "tracking", "app", "fields", "doctor", "terminal", "cli"}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "datasets"}
# Imported inside functions: packages that not everybody has or that take long, and not everybody needs.
LATE = {"bitsandbytes", "pynvml", "huggingface_hub", "datasets", "fsspec", "rouge_score", "sacrebleu", "nltk", "optuna",
        "tensorboard", "gguf", "mlflow", "wandb", "clearml"}  # fmt: skip
# `temper --help` and `import temper` wait for nothing: these import inside functions what they like.
QUICK = {
    "temper",
    "temper.cli",
    "temper.cli.planning",
    "temper.cli.runs",
    "temper.cli.base",
    "temper.cli.trained",
    "temper.fields",
    "temper.doctor",
    "temper.terminal",
}
# A type alone, for an annotation: the stage's `run` takes the job that holds the recipe.
ANNOTATIONS = {("recipe", "job"), ("references", "recipe")}
LONGEST = 350  # lines


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(f): f for f in sorted(SOURCE.rglob("*.py"))}


def part(module: str) -> str:
    """temper.models.load → models; temper itself → temper."""
    return module.split(".")[1] if "." in module else module


@cache
def imports(module: str) -> list[tuple[str, str]]:
    """What a module imports, each with where: top, function or annotation (under TYPE_CHECKING)."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    places: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            places |= {id(n): "annotation" for n in ast.walk(node)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            places |= {id(n): "function" for n in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        place = places.get(id(node), "top")
        if isinstance(node, ast.Import):
            found += [(alias.name, place) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative imports are not used here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in FILES else node.module, place))
    return found


def own(module: str, *places: str) -> set[str]:
    return {name for name, place in imports(module) if name.split(".")[0] == "temper" and place in places}


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part(m) for m in FILES} - {"temper"} == set(ORDER), "a new part needs a place in the table"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    me = part(module)
    for name in own(module, "top"):
        other = part(name)
        if other == me:
            continue
        if me == "temper" or other == "temper":
            assert me == "cli", "only the command line imports the package itself, for its version"
            continue
        assert ORDER.index(other) < ORDER.index(me), f"{module} imports {name}, which stands after it"
        assert me not in ONLY or other in ONLY[me], f"{module} may not know {name}"
    for name in own(module, "annotation"):
        after = ORDER.index(part(name)) > ORDER.index(me)
        assert not after or (me, part(name)) in ANNOTATIONS, f"{module} names a type of {name}, which stands after it"


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_imported_inside_functions_but_heavy_packages(module: str) -> None:
    inside = {name for name, place in imports(module) if place == "function"}
    if module not in QUICK:
        assert {name.split(".")[0] for name in inside} <= LATE, f"{module} imports {inside} inside functions"


@pytest.mark.parametrize("module", [m for m in FILES if part(m) in NO_TORCH])
def test_what_reads_and_writes_does_not_need_torch(module: str) -> None:
    direct = {name.split(".")[0] for name, place in imports(module) if place == "top"}
    assert not direct & HEAVY, f"{module} imports {direct & HEAVY}"


def test_no_circles() -> None:
    """Module by module, packages standing for their `__init__`."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(own(module, "top") - {module}):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_loop_knows_no_algorithm() -> None:
    """Neither a stage's kind nor a loss's name stands in the loop."""
    text = (SOURCE / "engine" / "loop.py").read_text(encoding="utf-8").lower()
    words = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not (words | names) & (set(stages) | set(token_losses) | {"dpo", "grpo", "ppo", "rloo", "kto"})


# Sentences


@pytest.mark.parametrize("module", FILES)
def test_public_things_say_what_they_are(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not obvious(node)
    ]
    assert not silent, f"{module}: {', '.join(silent)}"


def obvious(node: ast.AST) -> bool:
    """A function whose whole body is one line, read as fast as a sentence on it."""
    return isinstance(node, ast.FunctionDef) and len(node.body) == 1


@pytest.mark.parametrize(
    "table",
    [
        metrics,
        optim.optimizers,
        optim.schedules,
        rules,
        token_losses,
        preference_losses,
        unpaired_losses,
        stages,
        trackers,
    ],
    ids=lambda t: t.kind,
)
def test_registered_things_have_a_sentence_for_the_list(table) -> None:
    for name in table:
        first = (table.get(name).__doc__ or "").strip().partition("\n")[0]
        assert len(first) > 2, f"{table.kind} {name} has no docstring of its own"


@pytest.mark.parametrize("module", FILES)
def test_files_are_read_at_a_sitting(module: str) -> None:
    file = FILES[module]
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{file} has {lines} lines: it is telling you something"


# The surface


def test_all_is_what_is_there() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert defined - {"__all__"} == set(temper.__all__)
    assert all(hasattr(temper, name) for name in temper.__all__)


@pytest.mark.parametrize("module", [m for m, f in FILES.items() if f.name == "__init__.py" and m != "temper"])
def test_folders_export_what_they_name(module: str) -> None:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert all(hasattr(loaded, n) for n in names) and len(names) == len(set(names))


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("temper-lm") == temper.__version__


def test_import_temper_loads_nothing_heavy() -> None:
    code = "import sys, temper, temper.cli; print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & (HEAVY | {"numpy", "pydantic", "scipy", "pyarrow", "matplotlib"})


def test_every_module_can_be_imported_alone() -> None:
    """In an order that no other test happens to make."""
    for module in reversed(list(FILES)):
        assert inspect.ismodule(importlib.import_module(module))


def test_doctests_run_with_the_others(pytestconfig: pytest.Config) -> None:
    assert "src" in pytestconfig.getini("testpaths") and pytestconfig.getoption("doctestmodules")
