"""What the page asks for: two models that answer blind, verdicts, the ranking, and lists of items to judge."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sqlite3
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import AfterValidator, Field

from temper.serve import answers, ranking, refusals
from temper.serve.answering import Desk, ended
from temper.serve.items import List, Task
from temper.serve.protocol import Body, ChatRequest, Message, Number, Text
from temper.serve.refusals import Refused
from temper.serve.votes import Battle, Side, Talk, Votes, preferences

SIDES: tuple[Side, Side] = ("left", "right")
OF_ITEMS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 512}  # how answers to items are decoded
ANSWERS = 1024  # new tokens of an answer to a free prompt, unless told otherwise


def _named(who: str) -> str:
    if not who.strip() or not who.isprintable():
        raise ValueError("a name has printable characters")
    return who.strip()


Who = Annotated[Text, Field(max_length=80), AfterValidator(_named)]


class BattleRequest(Body):
    """A prompt for two models, drawn from those that are named."""

    messages: Annotated[list[Message], Field(min_length=1)]
    models: Annotated[list[Text], Field(min_length=2, max_length=100)]
    who: Who = "anonymous"
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.7
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class VoteRequest(Body):
    """A verdict."""

    verdict: Literal["left", "right", "tie", "both_bad"]
    who: Who = "anonymous"


def routes(desk: Desk, votes: Votes, listed: List | None) -> APIRouter:
    """All of /playground.

    Args:
        listed: items to be judged; None: free prompts alone.
    """
    router = APIRouter(prefix="/playground", responses=refusals.ERRORS)
    writing: dict[tuple[str, str], asyncio.Task[None]] = {}  # answers to items under way, by item and model

    def answered(task: Task) -> list[asyncio.Task[None]]:
        """What writes the two answers to an item: once, whoever asks first."""
        for model in task.models.values():
            key = task.item.id, model
            if key not in writing and votes.answer(task.item.id, model, OF_ITEMS) is None:
                writing[key] = asyncio.ensure_future(_answered(desk, votes, task, model))
                writing[key].add_done_callback(lambda done, key=key: (writing.pop(key), done.cancelled() or done.exception()))
        return [writing[task.item.id, model] for model in task.models.values() if (task.item.id, model) in writing]

    def battle_of(id: str) -> Battle:
        battle = votes.battle(id)
        if battle is None:
            raise Refused(404, "there is no such comparison", param="id")
        return battle

    @router.get("/state")
    async def state() -> dict[str, Any]:
        models = [{"name": s.name, "parent": s.parent, "templated": s.encoder.templated} for s in desk.gallery.served.values()]
        items = None if listed is None else {"name": listed.name, "items": len(listed.items), "total": listed.total}
        return {"models": models, "items": items, "votes": len(votes.judged())}

    @router.post("/battles")
    async def begin(asked: BattleRequest) -> dict[str, str]:
        names = list(dict.fromkeys(asked.models))
        if len(names) < 2:
            raise Refused(400, "a comparison takes two different models", param="models")
        for name in names:
            desk.served(name)
        models = dict(zip(SIDES, random.sample(names, 2), strict=True))
        settings = {"temperature": asked.temperature, "top_p": asked.top_p, "max_tokens": asked.max_tokens, "seed": secrets.randbits(53)}
        talk = [message.plain for message in asked.messages]
        for name in models.values():  # what cannot be asked is told now
            _works(desk, name, talk, settings)
        id = secrets.token_urlsafe(12)
        votes.begin(id, asked.who, talk, models, settings)
        return {"id": id}

    @router.get("/battles/{id}/stream")
    async def stream(id: str) -> Response:
        battle = battle_of(id)
        return StreamingResponse(_streamed(desk, votes, battle), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.post("/battles/{id}/vote")
    async def vote(id: str, asked: VoteRequest) -> dict[str, Any]:
        battle = battle_of(id)
        if not battle.written:
            raise Refused(409, "both answers must be finished before a verdict", param="id")
        if not votes.judge(id, asked.verdict, asked.who if battle.item is None else battle.who):
            raise Refused(409, "this comparison has its verdict already", param="id")
        names = {} if battle.item is not None else {side: battle.models[side] for side in SIDES}  # a list is judged blind to its end
        return {"verdict": asked.verdict, **names}

    @router.get("/ranking")
    async def rank() -> dict[str, Any]:
        return await asyncio.to_thread(ranked, votes.judged())

    @router.get("/votes.jsonl", response_class=Response)
    async def export() -> Response:
        rows, left_out = preferences(votes.judged())
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        headers = {
            "Content-Disposition": 'attachment; filename="votes.jsonl"', "X-Rows": str(len(rows)), "X-Left-Out": json.dumps(left_out),
        }  # fmt: skip
        return Response(lines, media_type="application/jsonl; charset=utf-8", headers=headers)

    @router.get("/items/next")
    async def following(who: Annotated[Who, Query()]) -> dict[str, Any]:
        if listed is None:
            raise Refused(404, "no items are to be judged here: start the server with --items")
        seen = votes.of_items(who)
        tasks, done = listed.open(who, seen)
        progress = {"done": done, "total": listed.total}
        if not tasks:
            return {"progress": progress, "battle": None}
        for one in answered(tasks[0]):
            await asyncio.shield(one)
        for ahead in tasks[1:2]:  # while this one is read
            answered(ahead)
        return {"progress": progress, "battle": _shown(votes, who, tasks[0], seen)}

    return router


def ranked(battles: Sequence[Battle]) -> dict[str, Any]:
    """All that votes say so far."""
    found = ranking.outcomes(battles)
    people: dict[str, int] = {}
    for one in found:
        people[one.who] = people.get(one.who, 0) + 1
    return {
        "votes": len(found), "models": ranking.ranked(found), "couples": ranking.couples(found), "agreement": ranking.agreement(found),
        "people": [{"who": who, "votes": n} for who, n in sorted(people.items(), key=lambda p: (-p[1], p[0]))],
    }  # fmt: skip


def _works(desk: Desk, model: str, talk: Talk, settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What it takes to have a model answer. Its name is left out of what is told: who judges is blind."""
    asked = ChatRequest.model_validate({"model": model, "messages": talk, "stream": True, **settings})
    if asked.max_tokens is None:
        asked.max_tokens = ANSWERS
    try:
        served = desk.served(model)
        room = served.room(len(desk.prompts(served, asked)[0]))
        if room is not None and room >= 1:
            asked.max_tokens = min(asked.max_tokens, room)
        return served, asked, desk.works(served, asked)
    except Refused as refused:
        message = refused.message.replace(f"«{model}»", "one of the models")
        raise Refused(refused.status, message, code=refused.code, param=refused.param) from None


async def _streamed(desk: Desk, votes: Votes, battle: Battle) -> AsyncIterator[str]:
    """Both answers as they come; what was written before is told at once."""
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def write(side: Side) -> None:
        if battle.texts[side] is not None:
            heard.put_nowait({"side": side, "text": battle.texts[side], "done": True, "ended": battle.ended[side]})
            return
        try:
            served, asked, works = _works(desk, battle.models[side], battle.messages, battle.settings)
            reply = answers.Reply(served, asked, works[0])
            with desk.under(served, works):
                over = False
                while not over:
                    await works[0].news.wait()
                    works[0].news.clear()
                    over = works[0].over  # before what is new is taken: what comes after it would not be told
                    for piece in reply.pieces():
                        if text := piece["delta"].get("content"):
                            heard.put_nowait({"side": side, "text": text, "done": False})
                await ended(works[0])
            (choice,) = reply.choices()
            votes.write(battle.id, side, choice["message"]["content"], choice["finish_reason"] == "stop")
            heard.put_nowait({"side": side, "done": True, "ended": choice["finish_reason"] == "stop"})
        except Refused as refused:
            heard.put_nowait({"side": side, "done": True, "error": refused.message})
        except sqlite3.Error as error:
            heard.put_nowait({"side": side, "done": True, "error": f"the answer cannot be kept: {error}"})

    tasks = [asyncio.ensure_future(write(side)) for side in SIDES]
    try:
        left = len(tasks)
        while left:
            event = await heard.get()
            left -= event["done"]
            yield answers.event(event)
        yield answers.DONE
    finally:
        for task in tasks:
            task.cancel()


async def _answered(desk: Desk, votes: Votes, task: Task, model: str) -> None:
    """Have a model answer an item."""
    served, asked, works = _works(desk, model, task.item.messages, OF_ITEMS)
    with desk.under(served, works):
        await ended(works[0])
    (choice,) = answers.Reply(served, asked, works[0]).choices()
    votes.keep(task.item.id, model, OF_ITEMS, choice["message"]["content"], choice["finish_reason"] == "stop")


def _shown(votes: Votes, who: str, task: Task, seen: Sequence[Battle]) -> dict[str, Any]:
    """A task as its judge sees it; shown again, it is the same comparison."""
    texts = {side: votes.answer(task.item.id, model, OF_ITEMS) for side, model in task.models.items()}
    again = next((b for b in seen if b.item == task.item.id and b.models == task.models and b.verdict is None and b.written), None)
    id = again.id if again is not None else secrets.token_urlsafe(12)
    if again is None:
        votes.begin(id, who, task.item.messages, task.models, OF_ITEMS, item=task.item.id)
        for side in SIDES:
            text = texts[side]
            assert text is not None
            votes.write(id, side, *text)
    shown = {side: {"text": text[0], "ended": text[1]} for side, text in texts.items() if text is not None}
    return {"id": id, "messages": task.item.messages, **shown}

