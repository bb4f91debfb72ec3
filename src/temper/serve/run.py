"""Starting the server."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from temper.errors import RecipeError
from temper.serve.answering import Desk
from temper.serve.app import application
from temper.serve.engine import Engine
from temper.serve.gallery import Gallery
from temper.serve.gate import loopback
from temper.serve.items import List, read
from temper.serve.votes import Votes

KEY = "TEMPER_API_KEY"


def serve(
    models: Sequence[str],
    *,
    adapters: Mapping[str, Path],
    adapters_from: Sequence[Path],
    reloads: bool,
    host: str,
    port: int,
    key: str | None,
    slots: int,
    queue: int,
    most: int,
    votes: Path,
    items: str | None,
    rows: int | None,
    device: str,
    precision: str,
    tell: Callable[[str], Any],
    said: Callable[[str], Any],
) -> None:
    """Load what is served and answer until interrupted.

    Args:
        reloads: requests may have the base's weights read anew, from those folders.
        tell: for notices.
        said: for the line that says where it listens.
        votes: the file in which verdicts are kept.
        items: rows that are to be judged, so many of them.

    Raises:
        RecipeError: an address that others reach, and no key; a port that is taken; a folder that is not there.
    """
    local = loopback(host)
    if not local and not key:
        raise RecipeError(
            f"{host} is reached from other machines, and there is no key",
            do=f"set the environment variable {KEY}, or --api-key-file; or leave --host out",
        )
    if missing := next((p for p in adapters_from if not p.is_dir()), None):
        raise RecipeError(f"there is no folder {missing}", do="--adapters-from takes folders that hold adapters")
    found = None if items is None else read(items, rows)
    with contextlib.ExitStack() as closing:
        kept = Votes(votes)
        closing.callback(kept.close)
        listening = _listen(host, port)
        closing.callback(listening.close)
        engine = Engine(device=device, precision=precision)
        engine.start()
        closing.callback(engine.close)
        gallery = Gallery(engine, folders=adapters_from, reloads=reloads, slots=slots)
        gallery.open(models, adapters)
        for notice in gallery.notices:
            tell(notice)
        listed = None if items is None or found is None else List(items, found, list(gallery.served))
        if listed is not None and not listed.couples:
            raise RecipeError("items are judged by comparing models, and only one is served", do="name a second model or an adapter")
        app = application(Desk(engine, gallery, queue=queue), votes=kept, listed=listed, key=key, local=local, most=most)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        for served in gallery.served.values():
            asked = served.encoder.description.replace("\n", "\\n")
            said(f"{served.name}: {asked}; {served.lane.reason}")
        said(f"listening on {address} (the API: {address}/v1); Ctrl-C ends")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])
        raise KeyboardInterrupt  # it returns when it was told to stop, and does not always say so while it is only starting


def _listen(host: str, port: int) -> socket.socket:
    """The socket, taken before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise RecipeError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}", do="--port 0 takes a free one") from None
    return listening


def key_of(file: Path | None) -> str | None:
    """The key of a file, or of the environment.

    Raises:
        RecipeError: the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(KEY, "").strip() or None
    try:
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the key cannot be read from {file}: {error}", do="write it into a file of one line") from None
    if not found:
        raise RecipeError(f"{file} is empty", do="write the key into it")
    return found
