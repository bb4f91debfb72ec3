"""How a row is put to a model: as a conversation, or as a plain prompt before its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from temper.errors import DataError
from temper.recipe import Config
from temper.types import Record, Row


class Format(Config):
    """How a prompt and an answer are written out for a model; the same in training and at inference."""

    chat: Literal["auto", "template", "plain", "speakers"] = Field(
        default="auto",
        description="template: the tokenizer's chat template; plain: prompt, separator, answer; auto: template where there is "
        "one; speakers: where there is none, each turn begins with its speaker's prefix and each answer ends with the end token.",
    )
    speakers: dict[Literal["system", "user", "assistant"], str] = Field(
        default={"system": "<system>", "user": "<user>", "assistant": "<assistant>"},
        description="What turns begin with, with chat: speakers. sft of a whole model makes special tokens of them and its "
        "tokenizer gets a template; to other models they are text like any.",
    )
    separator: str = Field(default="\n", description="What stands between prompt and answer in the plain form.")
    system: str | None = Field(default=None, description="A system message put before every conversation.")

    @field_validator("speakers")
    @classmethod
    def _apart(cls, value: dict[str, str]) -> dict[str, str]:
        if missing := {"user", "assistant"} - value.keys():
            raise ValueError(f"no prefix for the {' and the '.join(sorted(missing))}")
        if not all(v.strip() for v in value.values()) or len(set(value.values())) < len(value):
            raise ValueError("prefixes must differ, and none be blank: a model could not tell who speaks")
        return value


def is_text(row: Row) -> bool:
    """Whether a row is plain text, which has no prompt; a `text` beside an answer is a column carried along."""
    return "text" in row and not row.keys() & {"completion", "chosen", "messages"}


def check_prompts(records: Sequence[Record]) -> None:
    """Raises DataError where a row is plain text: there is nothing to answer."""
    if plain := next((r for r in records if is_text(r.row)), None):
        raise DataError(
            "plain text has no prompt to answer",
            where=plain.where,
            do="ask only for metrics of likelihood (loss, perplexity), or map the rows to prompt and completion",
        )


def conversation(row: Row, form: Format) -> list[dict[str, str]]:
    """A prompt–completion row as a conversation; `prompt` may itself be a list of messages (TRL's form)."""
    if "messages" in row:
        found = [dict(m) for m in row["messages"]]
    else:
        prompt, answer = row["prompt"], row.get("completion")
        found = [dict(m) for m in prompt] if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
        if answer is not None:
            found += (
                [dict(m) for m in answer] if not isinstance(answer, str) else [{"role": "assistant", "content": answer}]
            )
    if form.system is not None and (not found or found[0]["role"] != "system"):
        found.insert(0, {"role": "system", "content": form.system})
    return found


def asked(row: Row, form: Format) -> list[dict[str, str]]:
    """The conversation before its (last) answer."""
    messages = conversation({k: v for k, v in row.items() if k != "completion"}, form)
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def plain_prompt(row: Row, form: Format) -> str:
    """The text before an answer in the plain form.

    Newlines of the separator go with the prompt, its spaces with the answer: that is how tokenizers cut words.

    Raises:
        DataError: a conversation, which only a chat template can write out.
    """
    if "messages" in row:
        raise DataError(
            "a conversation needs a chat template",
            do="choose a model whose tokenizer has one, or map it to prompt and completion",
        )
    if not isinstance(row["prompt"], str):
        raise DataError("a prompt made of messages needs a chat template", do="choose a model whose tokenizer has one")
    return (f"{form.system}\n" if form.system else "") + row["prompt"] + form.separator.rstrip(" ")
