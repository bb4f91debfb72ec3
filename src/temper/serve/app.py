"""The application: routes, errors, health."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from temper.serve import api, playground, refusals
from temper.serve.answering import Desk
from temper.serve.gate import Gate
from temper.serve.items import List
from temper.serve.metrics import Metrics
from temper.serve.refusals import Refused
from temper.serve.votes import Votes

BODY = 4 << 20  # bytes of a request at most, unless told otherwise
PAGE = Path(__file__).parent / "page"
SAFE = {  # the page loads nothing but its own files, and nobody else's page may show it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip


class _Files(StaticFiles):
    """The page's: asked for anew each time, or a browser would mix those of two versions."""

    def file_response(self, *args: Any, **how: Any) -> Response:
        response = super().file_response(*args, **how)
        response.headers.update(SAFE)
        return response


def application(
    desk: Desk,
    *,
    votes: Votes,
    listed: List | None = None,
    key: str | None = None,
    local: bool = True,
    most: int = BODY,
) -> FastAPI:
    """All that is served over HTTP.

    Args:
        votes: where verdicts are kept.
        listed: items to be judged.
        key: what requests must bring; None: nothing.
        local: only requests to names of this machine itself are answered.
        most: bytes of a body at most.
    """
    metrics = Metrics(desk)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        desk.engine.serve(asyncio.get_running_loop())
        yield

    app = FastAPI(
        title="Temper", version=version("temper-lm"), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Models that were trained, behind OpenAI's protocol.",
    )  # fmt: skip
    app.include_router(api.routes(desk))
    if desk.gallery.reloads:
        app.include_router(api.reloading(desk))
    app.include_router(playground.routes(desk, votes, listed))
    app.mount("/page", _Files(directory=PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=SAFE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not desk.engine.thread.is_alive():
            raise Refused(503, "the computing thread has ended: restart the server")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def counted() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Any:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Any:
        return refusals.of_fields(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Any:
        what = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not answered at {request.url.path}"}
        return Refused(error.status_code, what.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Any:
        return Refused(500, f"this is a defect of the server: {type(error).__name__}").response()

    app.add_middleware(
        Gate, key=key, local=local, most=most, counted=lambda path, status: metrics.requests.labels(path, status).inc()
    )
    return app
