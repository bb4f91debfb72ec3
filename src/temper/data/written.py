"""How chat templates write conversations out: those of tokenizers, and a small one of ours for tokenizers that have none.

transformers runs templates in jinja's sandbox, where they reach nothing but what they are given. What the sandbox does not
bound, time and memory, is tried here first on a real conversation, in a child process with limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from temper.errors import ModelError

SECONDS, MEGABYTES, CHARACTERS = 10, 512, 10_000_000  # that a template may take for one conversation
# {% generation %} and {% endgeneration %}, with what jinja takes away around a block (trim_blocks, lstrip_blocks)
MARKS = re.compile(r"(?m)(?:^[ \t]*)?\{%(-?)\s*(end)?generation\s*(-?)%\}\n?")
OPENS, CLOSES = "\ue0f2", "\ue0f3"  # for private use: no text holds them
DONE, TOO_LONG, TOO_MUCH = 0, 3, 4  # how the child ends
Talk = list[dict[str, str]]

SPEAKERS = """\
{%- set prefixes = PREFIXES -%}
BOS{% for message in messages -%}
{%- if message['role'] not in prefixes %}{{ raise_exception('no prefix is given for the role ' + message['role']) }}{% endif -%}
{{- prefixes[message['role']] -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- prefixes['assistant'] -}}{%- endif -%}
"""


def begins(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def speakers(tokenizer: Any, prefixes: Mapping[Any, str]) -> str:
    """A template that puts a prefix before each turn and the end token behind each answer."""
    template = SPEAKERS.replace("BOS", "{{- bos_token -}}" if begins(tokenizer) else "")
    return template.replace("PREFIXES", json.dumps(dict(prefixes), ensure_ascii=False))


def prefixes_of(template: str) -> dict[str, str]:
    """Of a template that `speakers` wrote, the prefixes; empty of any other."""
    begin = "{%- set prefixes = "
    return json.loads(template[len(begin) :].partition(" -%}")[0]) if template.startswith(begin) else {}


def add_speakers(tokenizer: Any, prefixes: Mapping[Any, str]) -> list[int]:
    """The prefixes as special tokens of a tokenizer; their ids.

    Raises:
        ModelError: one of them is a token already, and so means something else.
    """
    for prefix in prefixes.values():
        if prefix in tokenizer.get_vocab():
            raise ModelError(
                f"the speaker's prefix «{prefix}» is a token of this tokenizer already",
                do="choose others: format: {speakers: {user: …, assistant: …, system: …}}",
            )
    tokenizer.add_tokens(list(prefixes.values()), special_tokens=True)
    return list(tokenizer.convert_tokens_to_ids(list(prefixes.values())))


def rendered(tokenizer: Any, talks: Sequence[Talk], *, prompt: bool = False) -> list[str]:
    """Conversations as the tokenizer's template writes them; `prompt`: up to where the model goes on.

    Raises:
        ModelError: the template refuses one.
    """
    if not talks:
        return []
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
    try:
        return tokenizer.apply_chat_template(list(talks), **how)  # type: ignore[no-any-return]
    except Exception:  # such as «roles must alternate», «no system role»; now find out where
        for messages in talks:
            try:
                tokenizer.apply_chat_template(messages, **how)
            except Exception as error:
                raise _refused(error, messages) from None
        raise


def _refused(error: Exception, messages: Talk) -> ModelError:
    broken = isinstance(error, jinja2.TemplateSyntaxError | jinja2.UndefinedError) or not isinstance(error, jinja2.TemplateError)  # fmt: skip
    if broken:
        return ModelError(
            f"the chat template cannot be run: {type(error).__name__}: {error}",
            do="mend the tokenizer's template, or set chat: plain in the data stage",
        )
    roles = ", ".join(str(m.get("role")) for m in messages)
    return ModelError(
        f"the chat template refuses a conversation of the roles {roles}: {error}",
        do="map the rows to roles that the template knows, or set chat: plain in the data stage",
    )


def special_within(tokenizer: Any, talks: Sequence[Talk]) -> Iterator[str]:
    """For each conversation in whose contents a special token is spelt out, that token: the model will read it as one."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for talk in talks:
        said = "\n".join(m["content"] for m in talk)
        if found := next((token for token in tokens if token in said), None):
            yield found


def marked(tokenizer: Any, talks: Sequence[Talk]) -> list[tuple[str, list[tuple[int, int]]]] | None:
    """Texts, and in each the answers as the template itself marks them by {% generation %}: (first character, one past the
    last), with the end token that follows where the marks leave it out. None where it marks none."""
    template, written = tokenizer.chat_template, []
    if not MARKS.search(template):
        return None
    special = [t.content for t in tokenizer.added_tokens_decoder.values()]
    shown = MARKS.sub(lambda m: f"{{{{{m[1]} '{CLOSES if m[2] else OPENS}' {m[3]}}}}}", template)
    for text in tokenizer.apply_chat_template(list(talks), chat_template=shown, tokenize=False):
        begin, *parts = text.split(OPENS)
        plain, places = begin, []
        for inside, _, after in (part.partition(CLOSES) for part in parts):
            places.append((len(plain), len(plain) + len(inside)))
            plain += inside + after
        written.append((plain, [(a, _closed(plain, b, special)) for a, b in places]))
    return written


def _closed(text: str, end: int, special: Sequence[str]) -> int:
    if any(text.endswith(token, 0, end) for token in special):
        return end
    return end + len(next((token for token in special if text.startswith(token, end)), ""))


def bounded(tokenizer: Any, talk: Talk) -> None:
    """Let the template write one conversation in a child process that may take so much time and memory.

    Raises:
        ModelError: it takes more.
    """
    child = os.fork()
    if child == 0:
        os._exit(_within(tokenizer, talk))
    until, status = time.monotonic() + SECONDS, None
    while status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = TOO_LONG
        else:
            time.sleep(0.001)
    if status != DONE:
        limit = f"{SECONDS} s" if status == TOO_LONG else f"{MEGABYTES} MB or {CHARACTERS:,} characters"
        raise ModelError(
            f"the chat template takes more than {limit} for a single conversation of {len(talk)} messages",
            do="do not use this tokenizer's template: set chat: plain in the data stage",
        )


def _within(tokenizer: Any, talk: Talk) -> int:
    """In the child: how it went."""
    with contextlib.suppress(Exception), open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
        most = now + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except MemoryError:
        return TOO_MUCH
    except BaseException:  # what is wrong with it is told by the parent
        return DONE
    return DONE if len(text) <= CHARACTERS else TOO_MUCH
