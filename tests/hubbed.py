"""A stand-in for the hub over real HTTP, and the command that uploads to it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as an upload of small files asks for."""

    got: dict[str, Any] = {}  # noqa: RUF012
    refuse = False

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, body: Any, code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer({"id": "me/jokes", "sha": "0" * 40, "siblings": []} if "/revision/" in self.path else {"error": "none"}, 200 if "/revision/" in self.path else 404)  # fmt: skip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuse:
            self._answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.got["repo"] = json.loads(body)
            self._answer({"url": f"http://{self.headers['Host']}/me/jokes"})
        elif "/preupload/" in self.path:
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})  # fmt: skip
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.got["files"] = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}  # fmt: skip
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/jokes/commit/{'1' * 40}", "commitOid": "1" * 40})  # fmt: skip
        else:
            self._answer({"error": self.path}, 404)


@contextlib.contextmanager
def _listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_served() -> Iterator[str]:
    """Its address."""
    Hub.got, Hub.refuse = {}, False
    with _listening(Hub) as address:
        yield address


def pushed(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`temper push` with a token, against this address."""
    return subprocess.run(
        [sys.executable, "-c", "from temper.cli import main; raise SystemExit(main())", "push", *words],
        env={**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


class Sets(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as reading the files of a data set asks for: its description, its tree, and parts of files."""

    folder = Path()
    parts: list[tuple[str, int]] = []  # noqa: RUF012  # what was read: file, bytes
    commit = "a" * 40
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, body: Any, code: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p for p in self.folder.iterdir() if p.is_file())
        if "/resolve/" in path:
            self._part(self.folder / path.rpartition("/")[2])
        elif path.endswith(f"/tree/{self.commit}"):
            self._answer([{"type": "file", "oid": "0" * 40, "size": p.stat().st_size, "path": p.name} for p in files])
        elif path.startswith("/api/datasets/me/sums") and "/tree/" not in path:
            self._answer({"id": "me/sums", "sha": self.commit, "siblings": [{"rfilename": p.name} for p in files], "private": False, "gated": False, "tags": []})  # fmt: skip
        else:
            self._answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")

    def _part(self, file: Path) -> None:
        if not file.is_file():
            self._answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            return
        data, asked = file.read_bytes(), self.headers.get("Range")
        a, _, b = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(a) : int(b) + 1 if b else None]
        self.parts.append((file.name, len(part)))
        more = {"Content_Range": f"bytes {a}-{int(a) + len(part) - 1}/{len(data)}"} if asked else {}
        self._answer(part, 206 if asked else 200, ETag='"0"', X_Repo_Commit=self.commit, Accept_Ranges="bytes", **more)


@contextlib.contextmanager
def sets_served(folder: Path) -> Iterator[str]:
    """The address of a hub whose data set me/sums is a folder's files."""
    Sets.folder, Sets.parts = folder, []
    with _listening(Sets) as address:
        yield address
