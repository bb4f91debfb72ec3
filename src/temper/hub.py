"""What a model's name stands for (a folder or a hub repository) and what identifies its content. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper import address
from temper.errors import ModelError, nearest
from temper.runfolder import file_sha256

PARTS = ("model", "adapter")  # of a stage's folder
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights or a tokenizer are: a local folder, or a hub id at a commit; `adapters` are put on it in turn."""

    name: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def endpoint(self) -> address.Address | None:
        """The endpoint behind which the model is, if it is behind one."""
        return address.endpoint(self.name)


def locate(name: str, folder: Path) -> Source:
    """A model reference that is no stage → Source.

    Args:
        name: a folder (relative to the recipe or to the current folder), be it a model's, an adapter's or that of a stage
            that made one; a hub id, optionally `id@revision`; or an endpoint, `URL#MODEL`.
        folder: the recipe's folder.

    Raises:
        ModelError: looks like a path and is not there; a folder without weights; a hub id that cannot be had.
    """
    if served := address.endpoint(name):
        return Source(str(served))
    for candidate in (folder / Path(name).expanduser(), Path(name).expanduser()):
        if candidate.is_dir():
            candidate = of_stage(candidate)
            _check_folder(candidate)
            if not (candidate / "config.json").is_file():
                return _adapter(candidate.resolve())
            return Source(str(candidate.resolve()))
        if candidate.is_file():
            raise ModelError(
                f"{name} is a file; a model is a folder with config.json and weights", do="give the folder"
            )
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        parent = (folder / Path(name).expanduser()).parent
        there = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        offer = nearest(Path(name).name, there)
        raise ModelError(
            f"there is no folder {name}",
            where=f"looked in {parent.resolve()}",
            do=offer
            if offer.startswith("did")
            else "name a folder with config.json and weights, or a hub id: ORG/NAME",
        )
    repo, _, revision = name.partition("@")
    return Source(repo, _commit(repo, revision or None))


def identity(source: Source) -> str:
    """What the content is: a hash of a folder's files, or a hub id at its commit; adapters included.

    Of an endpoint no more is known than its URL and the model's name: the service may change what stands behind it.
    """
    if source.endpoint:
        return source.name
    own = _folder_hash(source.name) if source.local else f"{source.name}@{source.revision}"
    return "+".join([own, *(_folder_hash(a) for a in source.adapters)])


def of_stage(folder: Path) -> Path:
    """Of a stage's folder in a run that of its model, `model/` before `adapter/`; any other folder as it is.

    Raises:
        ModelError: a run's folder, which may hold several, or a stage that made none.
    """
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")) or _holds_adapters(folder):
        return folder
    if inner := next((folder / part for part in PARTS if (folder / part).is_dir()), None):
        return inner
    if (folder / "stage.json").is_file():
        raise ModelError(f"the stage in {folder} made no model", do="name one that trains, such as runs/NAME/sft")
    if (folder / "manifest.json").is_file():
        made = sorted(
            p.name for p in folder.iterdir() if "@" not in p.name and any((p / part).is_dir() for part in PARTS)
        )
        do = (
            f"name one of its stages: {', '.join(f'{folder.name}/{name}' for name in made)}" if made else "it made none"
        )
        raise ModelError(f"{folder} is a whole run, not a model", do=do)
    return folder


def stage_folder(name: str) -> Path | None:
    """The folder of the stage that made a model, named by it or by the model's folder within; None of any other model."""
    return next((f for f in (Path(name), Path(name).parent) if (f / "stage.json").is_file()), None)


def _adapter(folder: Path) -> Source:
    """A folder with an adapter → its base, and the adapter on it.

    Raises:
        ModelError: the base is not named, or not there.
    """
    note = folder / "temper.json"
    if note.is_file():
        base = json.loads(note.read_text(encoding="utf-8"))["base"]
        beside = folder.parent.parent / (base["stage"] or "") / "model"  # a run folder may have been moved
        name = str(beside) if base["stage"] and beside.is_dir() else base["name"]
        found = Source(name, base["revision"], tuple(base["adapters"]))
    else:  # another tool's
        found = Source(read_config(str(folder), "adapter_config.json").get("base_model_name_or_path") or "")  # type: ignore[arg-type]
        if not found.name:
            raise ModelError(
                f"the adapter {folder} does not say on which base it was trained",
                do="name its base in base_model_name_or_path of adapter_config.json",
            )
    if not found.revision:
        found = dataclasses.replace(locate(found.name, folder), adapters=found.adapters)
    return dataclasses.replace(found, adapters=(*found.adapters, str(folder)))


def _holds_adapters(folder: Path) -> bool:
    """Whether it is the folder of adapters that were trained together."""
    note = folder / "temper.json"
    return note.is_file() and "parts" in json.loads(note.read_text(encoding="utf-8"))


def _check_folder(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in names or _holds_adapters(folder):
        return
    if "config.json" not in names:
        raise ModelError(
            f"{folder} has no config.json, so it is no model", do="files there: " + (", ".join(names[:8]) or "none")
        )
    if not any(n.endswith(WEIGHTS) for n in names):
        raise ModelError(
            f"{folder} holds no weights",
            do="expected *.safetensors beside config.json; was the download complete (git-lfs)?",
        )


def _folder_hash(folder: str) -> str:
    """SHA-256 over the model's and tokenizer's files; remembered by size and time of change within a process."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return _hash_of(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files), folder)


@functools.lru_cache(maxsize=64)
def _hash_of(files: tuple[tuple[str, int, int], ...], folder: str) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        if os.path.basename(path) not in {"README.md", "temper.json"}:
            digest.update(f"{os.path.relpath(path, folder)}:{file_sha256(Path(path))}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _commit(repo: str, revision: str | None) -> str:
    """The commit that a hub revision stands for now; from the local cache when the hub cannot be reached."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    def fetch(offline: bool) -> str:
        if not offline:  # asked once: a download would try for half a minute where there is no network
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json", revision=revision), timeout=10)
        path = hub.hf_hub_download(repo, "config.json", revision=revision, local_files_only=offline)
        return Path(path).parent.name  # …/snapshots/COMMIT/config.json

    try:
        return fetch(False)
    except errors.GatedRepoError:
        raise ModelError(
            f"{repo} is gated: its authors ask you to accept a licence",
            do=f"accept it on the model's page at the hub while logged in, then set HF_TOKEN (or run `hf auth login`). model: {repo}",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{repo} has no revision «{revision}»", do="name a branch, a tag or a commit after the @"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model «{repo}», or it is private",
            do="check the name; a private model needs HF_TOKEN; a local folder works too",
        ) from None
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            return _from_cache(repo, fetch, error)
        raise ModelError(
            f"«{repo}» is no model that can be loaded: {error}", do="a model is a folder or a hub id such as org/name"
        ) from None
    except Exception as error:  # no network: whatever the HTTP library raises
        return _from_cache(repo, fetch, error)


def _from_cache(repo: str, fetch: Callable[[bool], str], error: Exception) -> str:
    try:
        return fetch(True)
    except Exception:
        raise ModelError(
            f"the hub cannot be reached, and «{repo}» is not in the local cache",
            where=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}",
            do="connect, or download the model elsewhere and name its folder instead (--set model=PATH)",
        ) from None


def read_config(folder: str, name: str = "config.json") -> dict[str, object]:
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def bytes_to_fetch(repo: str, revision: str | None, kind: str, part: str | None = None) -> float | None:
    """Bytes of a hub repository that are not in the local cache yet; None where the hub does not say.

    Args:
        kind: «model» (its weights once, in safetensors where there are any) or «dataset».
        part: the configuration of a data set; its files stand in a folder of that name.
    """
    import huggingface_hub as hub

    try:
        api = hub.HfApi()
        info: Any = (api.model_info if kind == "model" else api.dataset_info)(
            repo, revision=revision, files_metadata=True, timeout=10
        )
    except Exception:  # no network, no such repository: whatever stops the stage is told by the stage
        return None
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
    if kind == "model":
        sizes = {n: size for n, size in sizes.items() if "/" not in n}
        weights = [n for n in sizes if n.endswith(WEIGHTS)]
        best = [n for n in weights if n.endswith(".safetensors")] or [n for n in weights if n.endswith(".bin")]
        sizes = {n: size for n, size in sizes.items() if n not in weights or n in best}
    elif part and any(n.startswith(f"{part}/") for n in sizes):
        sizes = {n: size for n, size in sizes.items() if n.startswith(f"{part}/")}
    cached = {
        n for n in sizes if isinstance(hub.try_to_load_from_cache(repo, n, revision=info.sha, repo_type=kind), str)
    }
    return float(sum(size for n, size in sizes.items() if n not in cached))
