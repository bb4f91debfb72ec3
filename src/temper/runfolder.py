"""The run folder on disk: stages appear whole or not at all, and damage is noticed.

A stage is written in `STAGE.partial/`, listed with checksums in its `stage.json` (the last file written), and
renamed. A result made under other settings is set aside as `STAGE@KEY`, and taken back when the settings return.
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
SCRATCH = ("checkpoints", "tokenizer", "answers")  # what only an unfinished stage needs: gone once it has its name
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


def _sweep(leftovers: Iterable[Path]) -> None:
    """Delete what `write_atomic` left where a kill fell between its write and its rename."""
    for path in list(leftovers):
        if path.is_file():
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

        Finishes a rename that a kill interrupted and takes back a result that had been set aside.
        """
        problem = None
        for folder in (self.path / name, self.path / f"{name}@{key[:SHORT]}", self.partial(name)):
            info = self._info(folder)
            if info is None and folder == self.path / name and folder.is_dir():
                problem = f"stage {name} was damaged after it was written (stage.json cannot be read); it runs again"
            if info is None or info.get("key") != key:
                continue
            if self._verified.get(name) != key:
                wrong = damage(folder, info["files"])
                if wrong:
                    problem = f"stage {name} was damaged after it was written ({wrong}); it runs again"
                    self._set_aside(folder, f"{name}@damaged-{key[:SHORT]}")
                    continue
                self._verified[name] = key
            if folder != self.path / name:
                self.make_room(name)
                os.rename(folder, self.path / name)
                sync_folder(self.path)
            self._tidy(name)
            return Result(name, self.path / name, info), problem
        return None, problem

    def recorded(self, name: str, key: str) -> Result | None:
        """The finished stage under this key where it lies now: nothing is verified, nothing is moved."""
        for folder in (self.path / name, self.path / f"{name}@{key[:SHORT]}", self.partial(name)):
            info = self._info(folder)
            if info is not None and info.get("key") == key:
                return Result(name, folder, info)
        return None

    def peek(self, name: str) -> Result | None:
        """The finished stage of that name under whatever key, not verified."""
        info = self._info(self.path / name)
        return Result(name, self.path / name, info) if info else None

    def begin(self, name: str, key: str) -> Path:
        """The folder to work in: unfinished work under the same key goes on, under another key it is set aside."""
        partial = self.partial(name)
        mark = partial / "partial.json"
        aside = self.path / f"{name}.partial@{key[:SHORT]}"
        if partial.is_dir():
            try:
                old = read_json(mark)["key"]
            except (OSError, ValueError, KeyError):
                old = None  # killed before the mark was written: nothing was done yet
            if old is None:
                shutil.rmtree(partial)
            elif old != key:
                self._set_aside(partial, f"{name}.partial@{old[:SHORT]}")
        if not partial.is_dir():
            if aside.is_dir():
                os.rename(aside, partial)
            else:
                partial.mkdir(parents=True)
                write_json(mark, {"key": key})
        return partial

    def commit(self, name: str, info: dict[str, Any]) -> Result:
        """List the files of `STAGE.partial` with checksums and give it its name."""
        partial = self.partial(name)
        _sweep(partial.rglob(".*.tmp"))
        files = checksums(partial, leave_out=("partial.json", "stage.json", *SCRATCH))
        info = {**info, "files": files, "bytes_on_disk": sum(f["bytes"] for f in files.values())}
        write_json(partial / "stage.json", info)
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
            self._set_aside(self.path / name, f"{name}@unreadable")

    def discard(self, name: str) -> None:
        """Forget the work of a stage that is to be run afresh; a finished result is set aside, not deleted."""
        if self.partial(name).is_dir():
            (self.partial(name) / "partial.json").unlink(missing_ok=True)  # first: half of it must not be gone on with
            shutil.rmtree(self.partial(name))
        self.make_room(name)

    def aside(self) -> list[Path]:
        """Everything set aside, for `temper prune`."""
        return sorted(p for p in self.path.iterdir() if p.is_dir() and "@" in p.name)

    def _tidy(self, name: str) -> None:
        """Delete what the work on a stage left in it. Only now: until it has its name, a kill would lose the work."""
        (self.path / name / "partial.json").unlink(missing_ok=True)
        for part in SCRATCH:
            shutil.rmtree(self.path / name / part, ignore_errors=True)

    def _set_aside(self, folder: Path, name: str) -> None:
        target = self.path / name
        n = 2
        while target.exists():
            target = self.path / f"{name}-{n}"
            n += 1
        os.rename(folder, target)

    @staticmethod
    def _info(folder: Path) -> dict[str, Any] | None:
        try:
            info = read_json(folder / "stage.json")
        except (OSError, ValueError):
            return None
        return info if isinstance(info, dict) and {"key", "files"} <= info.keys() else None
