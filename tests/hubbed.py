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
def hub_served() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.got, Hub.refuse = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def pushed(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`temper push` with a token, against this address."""
    return subprocess.run(
        [sys.executable, "-c", "from temper.cli import main; raise SystemExit(main())", "push", *words],
        env={**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
