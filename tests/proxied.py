"""A proxy on loopback before a real server: it notes what goes through, and may answer by itself or change what is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import httpx2

from served import Loopback


class Passed(NamedTuple):
    """A request, and the answer to it where it has one."""

    path: str
    body: dict[str, Any]
    status: int
    answer: str

    @property
    def json(self) -> Any:
        return json.loads(self.answer)


# (path, body) → what is sent on as the body; or a status and a text, which the server never hears of
Meddle = Callable[[str, dict[str, Any]], "dict[str, Any] | tuple[int, str]"]


class Proxy(Loopback):
    """`passed` is what went through, in order of the answers."""

    def __init__(self, behind: str, meddle: Meddle) -> None:
        self.behind, self.meddle = behind, meddle
        self.passed: list[Passed] = []
        self.lock = threading.Lock()
        self.client = httpx2.Client(timeout=60)
        super().__init__(self._handler())

    def of(self, path: str) -> list[Passed]:
        return [p for p in self.passed if p.path == f"/v1/{path}"]

    def close(self) -> None:
        super().close()
        self.client.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass({})

            def do_POST(self) -> None:
                self._pass(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

            def _pass(self, body: dict[str, Any]) -> None:
                sent = proxy.meddle(self.path, body)
                if isinstance(sent, dict):
                    given: Any = {"json": sent} if sent else {}
                    found = proxy.client.request(self.command, proxy.behind + self.path, **given)
                    status, answer = found.status_code, found.text
                else:
                    status, answer = sent
                with proxy.lock:
                    proxy.passed.append(Passed(self.path, body, status, answer))
                raw = answer.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        return Handler


@contextmanager
def proxied(behind: str, meddle: Meddle = lambda path, body: body) -> Iterator[Proxy]:
    made = Proxy(behind, meddle)
    try:
        yield made
    finally:
        made.close()
