"""The quickstart notebook runs from its first cell to its last, in a fresh kernel of this environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
NAME = "detox-summarization-smoke"


@pytest.fixture
def folder(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder in which the recipe's smoke profile has run already, so that only the rest takes time.

    Its kernel `python3` is this very interpreter: none need be registered.
    """
    shutil.copytree(smoke_run, tmp_path / "runs" / NAME)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "IPYTHONDIR": str(tmp_path / "ipython")}
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": argv, "display_name": "test", "language": "python", "env": env}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path


def test_it_runs_from_first_to_last(folder: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs)
    pages = [out.data["text/html"] for out in outputs if "text/html" in out.get("data", {})]
    assert "sft: cached" in text  # the shipped recipe's run was found
    assert "⟦" in text  # and the reader's own trained
    assert any("<table" in page and "rougeL" in page and "sft" in page for page in pages)
    assert any("srcdoc" in page and "&lt;/html&gt;" in page for page in pages)  # the report, within its frame
    assert any("<table" in page and "How much is" in page for page in pages)  # answers to the reader's own rows
    for name in (NAME, "answers"):
        results = json.loads((folder / "runs" / name / "report" / "results.json").read_text(encoding="utf-8"))
        models = ["base", "sft", "grpo"] if name == NAME else ["base", "sft"]
        assert list(results["evaluations"]["compare"]["models"]) == models


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")


def test_the_first_cell_installs_where_temper_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls pip for the checkout two folders up, and only where `temper` cannot be imported."""
    calls: list[list[str]] = []
    source = next(c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code")
    monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(words))
    exec(source, {})
    assert calls == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {})
    assert [words[:4] for words in calls] == [[sys.executable, "-m", "pip", "install"]]
    assert (NOTEBOOK.parent / calls[0][-1] / "pyproject.toml").is_file()
