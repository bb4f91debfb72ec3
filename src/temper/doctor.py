"""What this machine and a folder can do. Each check is tried, not assumed; a token is never shown."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from temper.errors import RunError

GOOD, HINT, MISSING = "ok", "note", "NO"
LEAST_FREE = 2e9  # bytes of disk below which even a small recipe may not fit
UNSURE = ("drvfs", "9p", "fuse", "cifs", "smb", "nfs", "vboxsf", "afs", "gcsfuse", "google")  # kinds of file systems


class Check(NamedTuple):
    """One line: `ok`, `note` (works, with a remark) or `NO` (something needed is missing)."""

    mark: str
    name: str
    text: str


def examine(folder: Path) -> list[Check]:
    """All checks of the machine, then those of `folder`, which runs would be written to.

    Raises:
        RunError: the folder is not there.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}", do="make it first, or name the folder runs would be written to")
    return [*_python(), *_packages(), *_machine(), *_accelerators(), *_threads(), *_hub(), *_folder(folder)]


def _python() -> Iterator[Check]:
    wanted = importlib.metadata.metadata("temper-lm")["Requires-Python"]
    fits = wanted is None or Requirement(f"python{wanted}").specifier.contains(platform.python_version())
    yield Check(GOOD if fits else MISSING, "Python", platform.python_version() + ("" if fits else f", needs {wanted}"))


def _packages() -> Iterator[Check]:
    """Versions against the ranges that the distribution declares."""
    right = []
    for text in importlib.metadata.requires("temper-lm") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue  # an extra, or another platform's
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(MISSING, need.name, f"not installed; pip install '{need}'")
            continue
        if need.specifier.contains(version.split("+")[0], prereleases=True):
            right.append(f"{need.name} {version}")
        else:
            yield Check(MISSING, need.name, f"{version}, needs {need.specifier}; pip install '{need}'")
    yield Check(GOOD, "packages", ", ".join(right))


def _machine() -> Iterator[Check]:
    import psutil

    from temper.manifest import hardware

    found = hardware()
    memory = psutil.virtual_memory()
    yield Check(GOOD, "processor", f"{found['cpu']}, {found['cores']} cores for this process")
    few = memory.available < 2e9
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free" + (
        "; little for training" if few else ""
    )
    yield Check(HINT if few else GOOD, "memory", text)
    flags = _cpu_flags()
    if flags is None:
        yield Check(HINT, "bf16 on CPU", "unknown: this system does not list the processor's features")
    elif quick := sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}):
        yield Check(GOOD, "bf16 on CPU", f"computed in hardware ({', '.join(quick)}): precision: bf16 is faster")
    else:
        yield Check(HINT, "bf16 on CPU", "emulated, slower than float32: leave precision: float32")


def _cpu_flags() -> set[str] | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    return None


def _accelerators() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return  # told among the packages
    import torch

    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(k)
            bf16 = p.major >= 8
            text = (
                f"{p.name}, {p.total_memory / 1e9:.0f} GB, {'bf16' if bf16 else 'no bf16: precision: fp16 or float32'}"
            )
            yield Check(GOOD, f"cuda:{k}", text)
    elif torch.backends.mps.is_available():
        yield Check(HINT, "GPU", "Apple's MPS is there; ask for it with device: mps (best effort)")
    elif torch.version.cuda:
        yield Check(
            HINT, "GPU", f"none is visible, though torch is built for CUDA {torch.version.cuda}: check the driver"
        )
    else:
        yield Check(HINT, "GPU", "none; mini profiles run on the CPU in minutes")


def _threads() -> Iterator[Check]:
    threads, policy = os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY")
    shown = f"OMP_NUM_THREADS {threads or 'not set'}, OMP_WAIT_POLICY {policy or 'not set'}"
    if (policy or "").upper() == "PASSIVE":
        yield Check(GOOD, "threads", shown)
    else:
        text = "; if several processes share this machine, OMP_WAIT_POLICY=PASSIVE keeps them from slowing one another"
        yield Check(HINT, "threads", shown + text)


def _hub() -> Iterator[Check]:
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    n = sum(1 for p in cache.glob("*--*")) if cache.is_dir() else 0
    offline = ", offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    yield Check(HINT if offline else GOOD, "hub cache", f"{cache}, {n} models and data sets{offline}")
    if get_token():
        yield Check(GOOD, "hub token", "there is one")
    else:
        yield Check(HINT, "hub token", "none; gated models need one: set HF_TOKEN or run `hf auth login`")


def _folder(folder: Path) -> Iterator[Check]:
    import psutil

    free = psutil.disk_usage(str(folder)).free
    yield Check(GOOD if free > LEAST_FREE else HINT, "disk", f"{free / 1e9:.1f} GB free in {folder.resolve()}")
    kind = file_system(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".temper-doctor-", dir=folder) as name:
            yield from try_folder(Path(name), kind)
    except OSError as error:
        yield Check(MISSING, "writing", f"impossible in {folder}: {error.strerror}; choose another folder with --out")


def try_folder(place: Path, kind: str = "") -> Iterator[Check]:
    """Rename, lock and sync, tried in an empty folder on the file system of type `kind`."""
    mounted = any(mark in kind for mark in UNSURE)
    remote = f" ({kind}, a mounted drive)" if mounted else f" ({kind})" if kind else ""
    problem = _attempt(lambda: _rename(place))
    if problem:
        yield Check(MISSING, "rename", f"{problem}{remote}: a finished stage could not appear whole; use a local disk")
    elif mounted:
        text = (
            f"works here{remote}, but such drives may copy instead of renaming: use a local disk and copy the run after"
        )
        yield Check(HINT, "rename", text)
    else:
        yield Check(GOOD, "rename", f"atomic{remote}")
    problem = _attempt(lambda: _lock(place))
    text = f"{problem}: never start two runs in one folder here" if problem else "flock keeps two runs apart"
    yield Check(HINT if problem else GOOD, "lock", text)
    problem = _attempt(lambda: _sync(place))
    text = f"{problem}: results may not survive a power cut" if problem else "fsync of files and folders"
    yield Check(HINT if problem else GOOD, "sync", text)


def _attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except OSError as error:
        return error.strerror or errno.errorcode.get(error.errno or 0, type(error).__name__)


def _rename(place: Path) -> str:
    """A folder with a file takes a new name as the same folder, and a file replaces another with open readers."""
    (place / "a.partial").mkdir()
    (place / "a.partial" / "file").write_text("1")
    before = (place / "a.partial").stat().st_ino
    os.rename(place / "a.partial", place / "a")
    if (place / "a.partial").exists() or (place / "a" / "file").read_text() != "1":
        return "a renamed folder is not whole"
    if before and (place / "a").stat().st_ino != before:
        return "renaming makes a copy"
    (place / "old").write_text("old")
    (place / "new").write_text("new")
    with open(place / "old") as reader:
        os.replace(place / "new", place / "old")
        if reader.read() != "old" or (place / "old").read_text() != "new":
            return "a replaced file changes under its readers"
    return ""


def _lock(place: Path) -> str:
    if sys.platform == "win32":
        return "no flock on Windows"
    import fcntl

    with open(place / "lock", "w") as one, open(place / "lock", "w") as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    return "two processes can hold one lock"


def _sync(place: Path) -> str:
    handle = os.open(place, os.O_RDONLY)
    try:
        with open(place / "synced", "w") as file:
            file.write("1")
            file.flush()
            os.fsync(file.fileno())
        os.fsync(handle)
    finally:
        os.close(handle)
    return ""


def file_system(folder: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds a folder («ext4», «fuse.drive»); empty where the system does not tell.

    Args:
        mounts: text in the form of /proc/mounts; None: the file itself.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return ""
    path = folder.resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        place, found = line.split()[1:3]
        point = Path(place.encode().decode("unicode_escape"))  # spaces stand as \040
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), found
    return kind
