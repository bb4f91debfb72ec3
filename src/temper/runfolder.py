"""The run folder on disk: stages appear whole or not at all, and damage is noticed.

A stage is written in `STAGE.partial/`, listed with checksums in its `stage.json` (the last file written, with a
checksum of its own), and renamed. A result made under other settings is set aside as `STAGE@KEY`, unfinished work as
`STAGE.partial@KEY`; both are taken back when the settings return.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from temper.errors import RunError

SHORT = 8  # hex digits of a key in a folder's name
# What only an unfinished stage needs: gone once it has its name.
SCRATCH = (
    "checkpoints", "stream", "tokenizer", "answers", "rollouts", "policies", "starts", "whole", "front", "clock.json", "partial.json",
)  # fmt: skip
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, a kill leaves one of the two."""
    raw = data.encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary with a last key `sha256`, over the canonical JSON of the rest."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as a reader will see it: lists, and keys that are text
    write_json(path, {**plain, "sha256": _seal(plain)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, without the checksum; None where it is absent, unreadable or not what was written."""
    try:
        value = read_json(path)
        given = value.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return value if given == _seal(value) else None


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_folder(path: Path) -> None:
    """Make a rename in `path` last through a power cut."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Relative path → size and SHA-256 of every file below `folder`, each file synced to disk on the way.

    `leave_out` names files and folders at the top.
    """
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] not in leave_out:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            out[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return out


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def progress(partial: Path) -> tuple[int, int]:
    """How far unfinished work has come: the steps up to its newest checkpoint, and how many models' answers it keeps.

    Of policies that are trained one after another, the steps of those that are finished count too.
    """
    steps = sum(_steps(folder) for folder in (partial, *partial.glob("policies/*")))
    return steps, len(list(partial.glob("answers/*.json")))


def _steps(folder: Path) -> int:
    if finished := read_sealed(folder / "weights.json"):
        return int(finished["note"]["counts"]["steps"])
    return max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*") if p.name[5:].isdecimal()), default=0)


def _sweep(leftovers: Iterable[Path]) -> None:
    """Delete what a kill left between a write and its rename, or of a folder that was being deleted."""
    for path in list(leftovers):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the files of a folder against their checksums, or None."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if file_sha256(path) != expected["sha256"]:
            return f"{name} differs from what was written (checksum)"
    return None


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished stage on disk."""

    name: str
    path: Path
    info: dict[str, Any]

    @property
    def key(self) -> str:
        return self.info["key"]

    @property
    def model(self) -> Path:
        """Where its model is: `model/` where there is one (merged or full), else `adapter/`."""
        return self.path / ("model" if (self.path / "model").is_dir() else "adapter")


class RunFolder:
    """One run on disk. One process at a time may write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verified: dict[str, str] = {}  # stage → key whose files were checked in this process

    def open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run folder: {error.strerror}", where=str(self.path), do="choose another with --out"
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go when the process ends, however it ends."""
        self.open()
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    "another process is working in this run folder",
                    where=str(self.path),
                    do="wait for it, or choose another --out",
                ) from None
            except OSError:
                pass  # a file system without locks (some network drives); `temper doctor` tells
            _sweep(self.path.glob(".*.tmp"))
            yield

    def partial(self, name: str) -> Path:
        return self.path / f"{name}.partial"

    def find(self, name: str, key: str) -> tuple[Result | None, str | None]:
        """The finished stage under this key, verified; and a sentence on what was found damaged, if anything was.

        Finishes a rename that a kill interrupted and takes back a result that had been set aside. What is damaged is
        set aside as `STAGE@damaged`.
        """
        damaged = None
        for folder in self._places(name, key):
            info = self._info(folder)
            if info is None:
                if ".partial" in folder.name or not folder.is_dir():
                    continue  # unfinished, or not there
                wrong = "stage.json is not what was written (checksum)"
            elif info["key"] != key:
                continue
            else:
                wrong = None if self._verified.get(name) == key else damage(folder, info["files"])
            if info is None or wrong:
                damaged = wrong
                self._set_aside(folder, f"{name}@damaged")
                continue
            self._verified[name] = key
            if folder != self.path / name:
                self.make_room(name)
                os.rename(folder, self.path / name)
                sync_folder(self.path)
            self._tidy(name)
            said = (
                damaged and f"stage {name} was damaged after it was written ({damaged}); another copy takes its place"
            )
            return Result(name, self.path / name, info), said
        return None, damaged and f"stage {name} was damaged after it was written ({damaged}); it runs again"

    def recorded(self, name: str, key: str) -> Result | None:
        """The finished stage under this key where it lies now: no file is verified, nothing is moved."""
        for folder in self._places(name, key):
            info = self._info(folder)
            if info is not None and info["key"] == key:
                return Result(name, folder, info)
        return None

    def _places(self, name: str, key: str) -> list[Path]:
        """Where a finished stage can be: the last two hold one where a kill fell before it was given its name."""
        aside = [p for base in (name, f"{name}.partial") for p in sorted(self.path.glob(f"{base}@{key[:SHORT]}*"))]
        return [self.path / name, *aside, self.partial(name)]

    def peek(self, name: str) -> Result | None:
        """The finished stage of that name under whatever key, not verified."""
        info = self._info(self.path / name)
        return Result(name, self.path / name, info) if info else None

    def begin(self, name: str, key: str) -> tuple[Path, str | None]:
        """The folder to work in, and a sentence on unfinished work that could not be gone on with, if there was such.

        Of unfinished work under this key, the one that came furthest goes on; under another key it is set aside.
        """
        partial, problem = self.partial(name), None
        old = self.unfinished(partial)
        if partial.is_dir() and old is None and any(p.name[0] != "." for p in partial.iterdir()):
            kept = self._set_aside(partial, f"{name}.partial@damaged")
            problem = (
                f"nobody can tell which settings the unfinished work of stage {name} belongs to: its partial.json is "
                f"damaged or gone. It was set aside as {kept.name}, and the stage begins anew"
            )
        elif partial.is_dir() and old is None:
            self._delete(partial)  # killed before the mark was written: nothing was done yet
        elif old is not None and old != key:
            self._set_aside(partial, f"{name}.partial@{old[:SHORT]}")
        best = max(self._all_unfinished(name, key), key=progress, default=None)
        if best is None:
            partial.mkdir(parents=True)
            write_sealed(partial / "partial.json", {"key": key})
        elif best != partial:
            if partial.is_dir():
                self._set_aside(partial, f"{name}.partial@{key[:SHORT]}")
            os.rename(best, partial)
        return partial, problem

    def unfinished(self, partial: Path) -> str | None:
        """The key that a folder of unfinished work belongs to; None where there is none, or none that can be trusted."""
        mark = read_sealed(partial / "partial.json")
        return mark["key"] if mark else None

    def _all_unfinished(self, name: str, key: str) -> list[Path]:
        folders = [self.partial(name), *sorted(self.path.glob(f"{name}.partial@{key[:SHORT]}*"))]
        return [folder for folder in folders if self.unfinished(folder) == key]

    def commit(self, name: str, info: dict[str, Any]) -> Result:
        """List the files of `STAGE.partial` with checksums and give it its name."""
        partial = self.partial(name)
        _sweep(partial.rglob(".*.tmp"))
        files = checksums(partial, leave_out=("stage.json", *SCRATCH))
        info = {**info, "files": files, "bytes_on_disk": sum(f["bytes"] for f in files.values())}
        write_sealed(partial / "stage.json", info)
        self.make_room(name)
        os.rename(partial, self.path / name)
        sync_folder(self.path)
        self._tidy(name)
        self._verified[name] = info["key"]
        return Result(name, self.path / name, info)

    def make_room(self, name: str) -> None:
        """Set the present result of a stage aside, so that a new one can take its name."""
        info = self._info(self.path / name)
        if info is not None:
            self._set_aside(self.path / name, f"{name}@{info['key'][:SHORT]}")
        elif (self.path / name).exists():
            self._set_aside(self.path / name, f"{name}@damaged")

    def discard(self, name: str, key: str) -> None:
        """Forget the unfinished work of a stage that is to be run afresh; a finished result is set aside instead."""
        for folder in self._all_unfinished(name, key):
            self._delete(folder)
        self.make_room(name)

    def aside(self) -> list[Path]:
        """Everything set aside, for `temper prune`."""
        return sorted(p for p in self.path.iterdir() if p.is_dir() and "@" in p.name and p.name[0] != ".")

    def _tidy(self, name: str) -> None:
        """Delete what the work on a stage left in it. Only now: until it has its name, a kill would lose the work."""
        for part in SCRATCH:
            path = self.path / name / part
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _set_aside(self, folder: Path, name: str) -> Path:
        target = self.path / name
        n = 2
        while target.exists():
            target = self.path / f"{name}-{n}"
            n += 1
        os.rename(folder, target)
        return target

    def _delete(self, folder: Path) -> None:
        """Under another name first: what a kill leaves of it must not be gone on with. `locked` deletes the rest."""
        gone = self.path / f".{folder.name}.deleted.tmp"
        os.rename(folder, gone)
        shutil.rmtree(gone)

    @staticmethod
    def _info(folder: Path) -> dict[str, Any] | None:
        return read_sealed(folder / "stage.json")
