"""What every request passes first: who asks, from which page, and how much is sent.

A page of another site that is open in a browser can send requests to servers of the machine it runs on. Those that come
with the name of another host, or from the page of another origin, are refused.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from typing import Any

from temper.serve.refusals import Refused

OPEN = ("/health", "/", "/favicon.ico")  # and the files of the page: they hold nothing, and are needed to ask for the key
PAGE = "/page/"
LOCAL = {"localhost", "127.0.0.1", "::1"}
Message = dict[str, Any]


class Gate:
    """ASGI middleware.

    Args:
        key: what requests must bring as `Authorization: Bearer KEY`; None: nothing.
        local: only requests to names of this machine itself are answered.
        most: bytes of a body at most.
        counted: told path, status of each response.
    """

    def __init__(
        self, app: Any, *, key: str | None, local: bool, most: int, counted: Callable[[str, int], Any]
    ) -> None:
        self.app, self.key, self.local, self.most, self.counted = app, key, local, most, counted

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope, headers)
            await self.app(scope, self._limited(headers, receive), noted)
        except Refused as refused:
            await refused.response()(scope, receive, noted)
        finally:
            route = scope.get("route")
            self.counted(getattr(route, "path", "other"), status)

    def _check(self, scope: Message, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = _name(host)
        if self.local and name not in LOCAL:
            raise Refused(403, f"this server answers to localhost alone, and was asked as «{host}»: start it with --host to serve others")
        origin = headers.get("origin")
        if origin is not None and origin != "null" and origin.partition("://")[2] != host:
            raise Refused(403, f"requests from pages of {origin} are not answered here")
        if origin == "null" or headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "requests from pages of other sites are not answered here")
        path = scope["path"]
        if self.key is None or path in OPEN or path.startswith(PAGE):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise Refused(401, "this server asks for a key: send it as «Authorization: Bearer KEY»", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if not hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode()):
            raise Refused(401, "the key is wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _limited(self, headers: dict[str, str], receive: Any) -> Any:
        """`receive`, which fails once more than is allowed has come."""
        too_much = Refused(413, f"the body is larger than {self.most:,} bytes: send less, or start the server with a larger --max-body", code="body_too_large")  # fmt: skip
        said = headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self.most:
            raise too_much
        come = 0

        async def limited() -> Message:
            nonlocal come
            message: Message = await receive()
            come += len(message.get("body", b""))
            if come > self.most:
                raise too_much
            return message

        return limited


def _name(host: str) -> str:
    """A host without its port.

    >>> _name("localhost:8000"), _name("[::1]:8000"), _name("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[0] else host


def loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
