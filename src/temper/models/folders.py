"""Models as folders of safetensors: merged and interpolated one tensor at a time, so that no model stands in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from temper.errors import ModelError

# What a model computes with its tensors, and their shapes do not tell
UNSEEN = (
    "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function",
)  # fmt: skip


class Tensors:
    """The tensors of a folder of safetensors, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[str]] = {}  # file → names in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._of: dict[str, str] = {}
        for file in sorted(p.name for p in folder.glob("*.safetensors")):
            with safe_open(folder / file, framework="pt") as opened:
                self.files[file] = sorted(opened.keys())
                for name in self.files[file]:
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._of[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self._of[name], framework="pt") as opened:
            return opened.get_tensor(name)


def merge(
    start: Path,
    models: Sequence[Path],
    out: Path,
    rule: Callable[[Sequence[torch.Tensor], str], torch.Tensor],
    *,
    eta: float = 1.0,
) -> None:
    """θ_0 + η·δ into a folder, δ being the merge of the models' task vectors: one tensor of each in memory at a time.

    Configuration and code are the start's, and so is the cut into files; generation ends at whatever ends any model.
    The tokenizer is not written.

    Args:
        rule: (task vectors of a tensor, its name) → the task vector of the merge.
        eta: 1: the merge; 0: the start (LITI, Ramé et al. 2024, section 3.3).

    Raises:
        ModelError: other architectures, tensors, shapes, or values of a tensor that is not trained (a buffer).
    """
    base, others = Tensors(start), [Tensors(m) for m in models]
    check_alike(base, others)

    def merged(name: str) -> torch.Tensor:
        origin = base[name]
        trained = [o[name] for o in others]
        if not origin.is_floating_point():
            if any(not torch.equal(origin, t) for t in trained):
                raise ModelError(f"{name} holds whole numbers that differ between the models", do="merge other models")
            return origin
        kind = origin.dtype
        for t in trained:
            kind = torch.promote_types(kind, t.dtype)
        exact = torch.promote_types(kind, torch.float32)
        origin = origin.to(exact)
        delta = rule([t.to(exact) - origin for t in trained], name)
        return (origin + eta * delta).to(kind)

    _write(base, out, merged)
    _settings(start, models, out)


def interpolate(start: Path, end: Path, out: Path, eta: float) -> None:
    """(1 − η)·θ_start + η·θ_end into a folder, one tensor at a time; 0 and 1 give the two bit for bit."""
    base, other = Tensors(start), Tensors(end)
    check_alike(base, [other])

    def mixed(name: str) -> torch.Tensor:
        a, b = base[name], other[name]
        if not a.is_floating_point():
            return a
        kind = torch.promote_types(a.dtype, b.dtype)
        exact = torch.promote_types(kind, torch.float32)
        return (a.to(exact) * (1 - eta) + b.to(exact) * eta).to(kind)

    _write(base, out, mixed)
    _settings(start, [end], out)


def angles(start: Path, models: Sequence[Path]) -> tuple[float, list[float]]:
    """(mean cosine between the whole task vectors of each two models, nan for one; norm of each).

    Ramé et al. 2024 find cosines near 0 between policies trained apart (appendix C.2).
    """
    base, others, gram = Tensors(start), [Tensors(m) for m in models], torch.zeros(len(models), len(models)).double()
    for name in base.shapes:
        origin = base[name]
        if origin.is_floating_point():
            deltas = [o[name].float() - origin.float() for o in others]
            gram += torch.tensor(
                [[float((a * b).sum(dtype=torch.float64)) for b in deltas] for a in deltas], dtype=torch.float64
            )
    norm = gram.diagonal().sqrt()
    pairs = torch.triu_indices(len(models), len(models), 1)
    return float((gram / norm / norm[:, None])[pairs[0], pairs[1]].mean()), norm.tolist()


def check_alike(base: Tensors, others: Sequence[Tensors]) -> None:
    """Raises ModelError where models are of other architectures, or have other tensors or shapes."""
    own = _config(base.folder)
    kind = own.get("model_type")
    for other in others:
        config = _config(other.folder)
        theirs = config.get("model_type")
        if theirs != kind:
            raise ModelError(
                f"a {theirs} cannot be merged with a {kind}",
                where=str(other.folder),
                do="merge models of one architecture that were trained from one start",
            )
        # a field that only one of them has is left out: versions of transformers write different ones
        differ = [f for f in UNSEEN if None not in (own.get(f), config.get(f)) and own[f] != config[f]]
        if differ:
            raise ModelError(
                f"the models read their weights in different ways: {differ[0]} is {own[differ[0]]} and {config[differ[0]]}",
                where=f"{base.folder} and {other.folder}",
                do="merge models that were trained from one start",
            )
        lacking = sorted(base.shapes.keys() ^ other.shapes.keys())
        if lacking:
            raise ModelError(
                f"the models do not have the same tensors: {lacking[0]} stands in one alone ({len(lacking)} such)",
                where=f"{base.folder} and {other.folder}",
                do="merge models that were trained from one start",
            )
        for name, shape in base.shapes.items():
            if other.shapes[name] != shape:
                raise ModelError(
                    f"the models are of different shapes: {name} has {list(shape)} and {list(other.shapes[name])}",
                    where=f"{base.folder} and {other.folder}",
                    do="merge models that were trained from one start",
                )


def _write(base: Tensors, out: Path, tensor: Callable[[str], torch.Tensor]) -> None:
    """A folder cut into files as the base is."""
    out.mkdir(parents=True, exist_ok=True)
    for file, names in base.files.items():
        save_file({name: tensor(name).contiguous() for name in names}, out / file, metadata={"format": "pt"})


def _settings(start: Path, models: Sequence[Path], out: Path) -> None:
    """What stands beside the weights: the start's configuration and code, and the end tokens of all."""
    weights = ("*.safetensors.index.json", "config.json", "*.py")
    for file in sorted(p for pattern in weights for p in start.glob(pattern)):
        shutil.copyfile(file, out / file.name)
    config = _config(out)
    stored = next(_dtypes(out), None)
    if stored is not None and config.get("dtype", config.get("torch_dtype")) not in (None, stored):
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": stored}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    found = [g for m in (*models, start) if (g := _config(m, "generation_config.json"))]
    if found:
        ends = sorted({e for g in found for e in _listed(g.get("eos_token_id"))})
        text = json.dumps(found[0] | ({"eos_token_id": ends} if ends else {}), indent=2)
        (out / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def _dtypes(folder: Path) -> Iterator[str]:
    tensors = Tensors(folder)
    for name in tensors.shapes:
        if (found := tensors[name]).is_floating_point():
            yield str(found.dtype).removeprefix("torch.")


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    file = folder / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
