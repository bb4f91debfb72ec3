"""OpenAI's protocol, and vLLM's for adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from temper.errors import ModelError, TemperError
from temper.serve import refusals
from temper.serve.answering import Desk
from temper.serve.gallery import Served
from temper.serve.protocol import ChatRequest, CompletionRequest, LoadAdapter, Reload, UnloadAdapter


def routes(desk: Desk) -> APIRouter:
    """All of /v1."""
    router = APIRouter(prefix="/v1", responses=refusals.ERRORS)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served) for served in desk.gallery.served.values()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _card(desk.served(name)) if name else await models()

    @router.post("/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(asked, request)

    @router.post("/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(asked, request)

    async def _answer(asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        served = desk.served(asked.model)
        works = desk.works(served, asked)
        if asked.stream:
            stream = desk.stream(served, asked, works)
            # What cannot be taken in is told with its status; of a text the first piece may be long in coming.
            first = await _unless_gone(request, anext(stream))

            async def pieces() -> AsyncIterator[str]:
                try:
                    yield first
                    async for piece in stream:
                        yield piece
                finally:
                    await stream.aclose()  # type: ignore[attr-defined]

            return StreamingResponse(pieces(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(await _unless_gone(request, desk.whole(served, asked, works)))

    @router.post("/load_lora_adapter", response_class=PlainTextResponse)
    async def load(asked: LoadAdapter) -> str:
        try:
            await asyncio.to_thread(desk.gallery.load, asked.lora_name, asked.lora_path)
        except ModelError as error:
            missing = error.what.startswith("there is no")
            raise refusals.told(error, 404 if missing else 400, param="lora_path") from None
        except TemperError as error:
            raise refusals.told(error, param="lora_name") from None
        return f"Success: LoRA adapter '{asked.lora_name}' added successfully."

    @router.post("/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(asked: UnloadAdapter) -> str:
        try:
            await asyncio.to_thread(desk.gallery.unload, asked.lora_name)
        except ModelError as error:
            raise refusals.told(error, 404, param="lora_name") from None
        except TemperError as error:
            raise refusals.told(error, param="lora_name") from None
        return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."

    return router


def reloading(desk: Desk) -> APIRouter:
    """The calls of vLLM's development mode by which a base gets other weights."""
    router = APIRouter(responses=refusals.ERRORS)

    @router.post("/collective_rpc")
    async def reload(asked: Reload) -> dict[str, Any]:
        try:
            await asyncio.to_thread(desk.gallery.reload, asked.kwargs.weights_path)
        except TemperError as error:
            raise refusals.told(error, param="weights_path") from None
        return {"results": [None]}

    @router.post("/reset_prefix_cache")
    async def forget() -> dict[str, bool]:
        return {"success": True}  # nothing of a prompt is kept from one request to the next

    return router


async def _unless_gone(request: Request, work: Any) -> Any:
    """What an awaitable gives; it is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise refusals.Refused(499, "the client hung up")
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "temper", "root": served.source.name,
        "parent": served.parent, "max_model_len": served.context,
    }  # fmt: skip
