"""Rows of any source → rows of TRL's dataset types, by templates.

    prompt: "Summarise:\n{text}"
    completion: "{summary}"
    messages: [{role: user, content: "{question}"}, {role: assistant, content: "{answer}"}]

The types (https://huggingface.co/docs/trl/dataset_formats), by a row's columns:

    language_modeling      text | messages
    prompt_only            prompt
    prompt_completion      prompt, completion
    preference             chosen, rejected (prompt)
    unpaired_preference    prompt, completion, label (true or false)

`prompt`, `completion`, `chosen` and `rejected` are all text or all lists of messages. `messages` may be a dialogue in one of
the other forms that `dialogues` reads.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from temper.data import dialogues
from temper.data.templates import filled, is_null, parsed
from temper.errors import DataError, RecipeError, nearest
from temper.types import Record, Row

TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
COLUMNS = (*TEXT_COLUMNS, "label")
TYPES = ("language_modeling", "prompt_only", "prompt_completion", "preference", "unpaired_preference")
READ = "messages may have role and content, from and value, speaker_name and phrase, or be plain texts in turn"
ROLES = ("user", "assistant", "system", "tool")


def _label(value: Any) -> Any:
    """CSV knows only text: a label that reads as true, false or a number is one."""
    if not isinstance(value, str):
        return None if is_null(value) else value
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def apply(
    records: Sequence[Record],
    templates: dict[str, Any],
    types: Collection[str] | None = None,
    *,
    keep: Sequence[str] = (),
) -> list[Record]:
    """As `applied`, all at once."""
    return list(applied(records, templates, types, keep=keep))


def applied(
    records: Sequence[Record],
    templates: dict[str, Any],
    types: Collection[str] | None = None,
    *,
    keep: Sequence[str] = (),
) -> Iterator[Record]:
    """Rows made by `templates` and checked to be of one dataset type.

    Args:
        records: what a source gave.
        templates: dataset column → template (text, or a list of messages with templates in them). Empty: the rows
            are taken as they are and must already be of a dataset type.
        types: dataset types that are allowed; None allows all.
        keep: further columns to carry along, by name.

    Raises:
        RecipeError: an unknown template key, a lone brace, a kept column that a template also makes.
        DataError: a row without a column, or that fits no allowed type, or another type than the first row.
    """
    for key in templates:
        if key not in COLUMNS:
            raise RecipeError(f"there is no dataset column «{key}» to make", do=nearest(key, COLUMNS))
        if key in keep:
            raise RecipeError(f"«{key}» is both kept and made by a template", do="take it out of `keep`")
    ready = {key: parsed(template, key) for key, template in templates.items()}
    known = {name for record in records for name in record.row} if keep else set[str]()
    for name in keep:
        if name not in known:
            raise DataError(f"there is no column «{name}» to keep", do=nearest(name, known))
    first = ""
    for record in records:
        row = {key: filled(template, record, key) for key, template in ready.items()} if ready else dict(record.row)
        if "label" in row:
            row["label"] = _label(row["label"])
        if not ready and "messages" not in row and "conversations" in row:
            row["messages"] = row.pop("conversations")  # ShareGPT's column
        if "messages" in row:
            row["messages"] = dialogues.messages(row["messages"], record.where)
        if ready:
            row |= {name: record.row.get(name) for name in keep}
        kind = dataset_type(row, where=record.where)
        first = first or kind
        if kind != first:
            raise DataError(f"the rows are {first} up to here, and this one is {kind}", where=record.where)
        if types is not None and kind not in types:
            raise DataError(
                f"these rows are {kind}; what is needed: {' or '.join(types)}",
                where=record.where,
                do="give templates (prompt, completion, chosen, rejected, messages, text, label) that make such rows",
            )
        yield Record(row, record.where)


def dataset_type(row: Row, *, where: str = "") -> str:
    """Which of TRL's dataset types a row is (see the top of this file).

    >>> dataset_type({"prompt": "2+2?", "completion": "4", "source": "a book"})
    'prompt_completion'

    Raises:
        DataError: no type fits, more than one fits, or a value is not what its type needs.
    """
    kind = _type_by_columns(row, where)
    parts = [name for name in ("prompt", "completion", "chosen", "rejected") if name in row]
    if kind == "language_modeling":
        parts = ["messages"] if "messages" in row else ["text"]
    for name in parts:
        if name == "messages" or (isinstance(row[name], list) and name != "text"):
            _check_messages(row[name], name, where)
        elif not isinstance(row[name], str):
            raise DataError(f"«{name}» is {type(row[name]).__name__}, not text", where=where)
    if len({type(row[name]) for name in parts}) > 1:
        raise DataError(f"{' and '.join(parts)}: some are text and some are messages", where=where)
    if kind == "unpaired_preference" and (not isinstance(row["label"], int) or row["label"] not in (0, 1)):
        raise DataError(
            f"label = {row['label']!r}: beside a prompt and a completion it says true (good) or false (bad)",
            where=where,
        )
    return kind


def _type_by_columns(row: Row, where: str) -> str:
    has = row.__contains__
    if has("chosen") or has("rejected"):
        if not (has("chosen") and has("rejected")):
            raise DataError("a preference needs both chosen and rejected", where=where)
        return "preference"
    if has("completion"):
        if not has("prompt"):
            raise DataError("a completion needs its prompt", where=where, do="text without a prompt is `text`")
        return "unpaired_preference" if has("label") else "prompt_completion"
    found = [name for name in ("messages", "text", "prompt") if has(name)]
    if len(found) == 1:
        return "prompt_only" if found == ["prompt"] else "language_modeling"
    if found:
        raise DataError(
            f"the row has {' and '.join(found)}: it is not clear what to train on",
            where=where,
            do=f'name one by a template, such as {found[0]}: "{{{found[0]}}}"',
        )
    raise DataError(
        f"the row is of no dataset type; it has: {', '.join(row) or 'no columns'}",
        where=where,
        do='make one by templates, such as prompt: "{question}", completion: "{answer}"',
    )


def _check_messages(messages: Any, name: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"«{name}» must be a list of messages and not empty", where=where, do=READ)
    for i, message in enumerate(messages):
        at = f"{name}[{i}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            keys = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise DataError(f"{at} must have role and content; it has: {keys}", where=where, do=READ)
        if message["role"] not in ROLES:
            raise DataError(f"{at}: unknown role {message['role']!r}", where=where, do=f"roles: {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise DataError(f"{at}: content is {type(message['content']).__name__}, not text", where=where)


def split(row: Row) -> tuple[Any, Any, Any] | None:
    """(prompt, chosen, rejected), both answers without the prompt; the prompt is None of whole texts.

    None where the two do not answer the same prompt.
    """
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    if isinstance(answers[0], str):
        return prompt, *answers  # type: ignore[return-value]
    whole = [bool(a) and a[0]["role"] != "assistant" for a in answers]
    if prompt is None:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False))
        prompt = [m for m, _ in same]
        whole = [True, True]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(w and a[: len(asked)] != asked for w, a in zip(whole, answers, strict=True)):
        return None
    rest = [a[len(asked) :] if w else a for w, a in zip(whole, answers, strict=True)]
    if not asked or any(a and a[0]["role"] != "assistant" for a in rest):
        return None  # what differs first is something that was asked
    return asked, *rest  # type: ignore[return-value]


def answered(prompt: Any, answer: Any) -> Row:
    """One answer as a row that the encoder knows."""
    return {"text": answer} if prompt is None else {"prompt": prompt, "completion": answer}


def text_of(value: Any) -> str | None:
    """Text, or the contents of messages one after another; None for what is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(str(m["content"]) for m in value)
    return None


def texts(row: Row) -> dict[str, str]:
    """A row's text by column: its dataset columns, or where it has none, whatever columns hold text.

    A `text` beside an answer is a column carried along, and no part of the example.
    """
    names = [name for name in TEXT_COLUMNS if name in row] or sorted(row)
    if row.keys() & {"completion", "chosen", "messages"}:
        names = [name for name in names if name != "text"]
    found = {name: text_of(row[name]) for name in names}
    return {name: text for name, text in found.items() if text is not None}


def key_of(row: Row) -> str:
    """What makes two rows equal: their text but for case and spaces. Empty where a row has none."""
    return "\x1f".join(f"{name}\x1e{normalised(text)}" for name, text in texts(row).items())


def joined_text(row: Row) -> str:
    return "\n".join(texts(row).values())


def prompt_of(row: Row) -> str | None:
    """What the model is asked: the prompt, or the conversation before the last answer; None where there is none."""
    if "prompt" in row:
        value = row["prompt"]
    else:
        value = row.get("messages", row.get("chosen"))
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            value = value[:-1] if value[-1].get("role") == "assistant" else None
        else:
            value = None
    text = text_of(value)
    return text if text and text.strip() else None


def normalised(text: str) -> str:
    """Text for comparing: composed (NFC), caseless, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN is null, what JSON does not know (dates, bytes) is its text."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if is_null(value):
        return None
    return value if isinstance(value, str | int | float) else str(value)


def canonical(row: Row) -> str:
    """A row as JSON that does not depend on the order of its columns."""
    return json.dumps(plain(row), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
