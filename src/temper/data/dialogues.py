"""Dialogues in the forms that data sets hold them → messages.

    [{role: user, content: …}, …]              as they are
    [{from: human, value: …}, …]               ShareGPT
    [{speaker_name: …, phrase: …}, …]          whoever speaks second is the assistant, all others are the user
    ["…", "…", …]                              two speakers in turn, the user first

A column of text may hold any of them as JSON, as it does in CSV files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from temper.errors import DataError, nearest
from temper.types import Row

SHAREGPT = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
MAY_FOLLOW = {  # role → what may stand before it; None: nothing does
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def messages(turns: Any, where: str = "") -> Any:
    """Any of the forms above → messages; what is none of them comes back as it is, for its reader to refuse.

    >>> messages([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}])
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    >>> [m["role"] for m in messages(["Кто там?", "Это я.", "Кто я?"])]
    ['user', 'assistant', 'user']

    Raises:
        DataError: an unknown role.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            return turns
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return turns
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
    if not all(isinstance(turn, Mapping) for turn in turns):
        return turns
    if all("from" in turn and "value" in turn for turn in turns):
        return [{"role": _role(turn["from"], k, where), "content": turn["value"]} for k, turn in enumerate(turns)]
    if all("phrase" in turn for turn in turns):
        return _by_speakers(turns)
    return turns


def _role(name: Any, place: int, where: str) -> str:
    if str(name).lower() not in SHAREGPT:
        raise DataError(f"turn {place + 1} is from «{name}», which is no known role", where=where, do=nearest(str(name), SHAREGPT))  # fmt: skip
    return SHAREGPT[str(name).lower()]


def _by_speakers(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a role says without another between is one message. Where no turn has a name, the speakers are in turn."""
    names = [str(turn.get("speaker_name") or "").strip() for turn in turns]
    if not any(names):
        return list(messages([turn["phrase"] for turn in turns]))
    second = next((name for name in names if name != names[0]), None)
    out: list[dict[str, Any]] = []
    for name, turn in zip(names, turns, strict=True):
        role = "assistant" if name == second else "user"
        if out and out[-1]["role"] == role:
            out[-1]["content"] += f"\n{turn['phrase']}"
        else:
            out.append({"role": role, "content": turn["phrase"]})
    return out


def turns(row: Row) -> int | None:
    """How many messages a conversation has, the system's aside; None of a row that is none."""
    return None if "messages" not in row else sum(m["role"] != "system" for m in row["messages"])


def disorder(row: Row) -> str | None:
    """What is wrong with the order of a conversation's roles, if anything is.

    >>> disorder({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})
    'message 2 is from the user and follows one from the user'
    """
    before: str | None = None
    for k, message in enumerate(row.get("messages", ())):
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            after = f"follows one from the {before}" if before else "nothing stands before it"
            return f"message {k + 1} is from the {role} and {after}"
        before = role
    return None
