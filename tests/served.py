"""A real HTTP server on loopback that stands for a model: what it answers is a function of what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One request: the path, the headers, the body, and how many had this very prompt before (0: it is the first)."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    before: int

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


class Reply(NamedTuple):
    """What goes over the wire. `hang_up`: the connection is closed without a word; `wait`: seconds before anything."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = {}  # noqa: RUF012
    hang_up: bool = False
    wait: float = 0.0


Script = Callable[[Asked], Reply | str]


def chat(text: str | None, reason: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply(body=json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]}))


def completion(text: str, reason: str = "stop") -> Reply:
    return Reply(body=json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": reason}]}))


class Loopback:
    """A server in a thread of this process, at `url` until it is closed."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Served(Loopback):
    """The requests that came, in order, and how many were under way at once at most."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        super().__init__(self._handler())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served._lock:
                    asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, body, 0)
                    before = sum(a.prompt == asked.prompt for a in served.requests)
                    served.requests.append(asked := asked._replace(before=before))
                    served._now += 1
                    served.most_at_once = max(served.most_at_once, served._now)
                try:
                    reply = served.script(asked)
                    self._send(chat(reply) if isinstance(reply, str) else reply)
                except (BrokenPipeError, ConnectionResetError):  # whoever asked is gone
                    self.close_connection = True
                finally:
                    with served._lock:
                        served._now -= 1

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.wait)
                if reply.hang_up:
                    self.close_connection = True
                    return
                raw = reply.body.encode()
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        return Handler


@contextmanager
def serving(script: Script) -> Iterator[Served]:
    made = Served(script)
    try:
        yield made
    finally:
        made.close()
