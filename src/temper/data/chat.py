"""A row of data → token ids, with the trained part exact to the token.

Prompt and answer are tokenised together, so that the ids are those the tokenizer gives to the whole text, and the
prompt must be a prefix of them. Where the tokenizer merges across the seam, the seam moves back to the last token
they share, and that is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from temper.data.forms import Format, asked, check_prompts, conversation, is_text, plain_prompt
from temper.data.seams import Seams, Unknown
from temper.data.written import Talk, add_speakers, bounded, marked, prefixes_of, rendered, speakers, special_within
from temper.errors import DataError, ModelError
from temper.types import Record, Row

AT_ONCE = 1000  # rows that are tokenised together: enough to keep all cores busy


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of one row; `trained[i]` says whether token i belongs to an answer (its end token included)."""

    ids: list[int]
    trained: list[bool]
    where: str
    moved_seam: bool = False

    apart: bool = False  # for an encoder–decoder: the encoder reads what stands before the first trained token

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return self.trained.index(True) if True in self.trained else len(self.ids)

    @property
    def length(self) -> int:
        """The longest sequence that a model meets in it."""
        return max(self.prompt_length, len(self.ids) - self.prompt_length) if self.apart else len(self.ids)


class Encoder:
    """Renders and tokenises rows of TRL's dataset types for one tokenizer.

    Args:
        end_ids: tokens that end an answer, beside the tokenizer's own.
        apart: for an encoder–decoder: prompt and (last) answer are tokenised by themselves, each with the special tokens
            that the tokenizer gives a text, and no separator.
        teach: the model is trained on the rows as a whole, so that prefixes of speakers can become special tokens;
            `tokens` then counts those that were added.

    Raises:
        ModelError: the template cannot be used: no end token, answers that cannot be found in the rendered text.
    """

    def __init__(
        self, tokenizer: Any, form: Format, *, end_ids: Sequence[int] = (), apart: bool = False, teach: bool = False
    ) -> None:
        self.tokenizer, self.form, self.apart, self.tokens = tokenizer, form, apart, 0
        if form.chat == "speakers" and not tokenizer.chat_template and tokenizer.eos_token_id is not None:
            self.tokens = len(add_speakers(tokenizer, form.speakers)) if teach else 0
            tokenizer.chat_template = speakers(tokenizer, form.speakers)
        self.templated = form.chat in ("template", "speakers") or (
            form.chat == "auto" and bool(tokenizer.chat_template)
        )
        self._tried = False
        self.intruders = Counter[str]()  # special tokens that stand in what is said, and in how many conversations
        if self.templated and not tokenizer.chat_template:
            raise ModelError(
                "the recipe asks for the chat template, and the tokenizer has none",
                do="set chat: plain in the data stage",
            )
        self.seams = Seams(tokenizer, templated=self.templated)
        self.unknown = Unknown(tokenizer)
        self.end_ids = set(end_ids) | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
        if not self.end_ids:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so a model could never learn to stop",
                do="add eos_token to it",
            )

    @property
    def description(self) -> str:
        system = f", after the system message {self.form.system!r}" if self.form.system else ""
        if self.apart:
            asked = "by the tokenizer's chat template" if self.templated else "as it is"
            return f"the prompt {asked} for the encoder, the answer for the decoder{system}"
        if prefixes := prefixes_of(self.tokenizer.chat_template or ""):
            return f"{prefixes['user']} question {prefixes['assistant']} answer and end token{system}"
        if self.templated:
            return f"the tokenizer's chat template{system}"
        return f"plain: prompt + {self.form.separator!r} + answer + end token{system}"

    def prompt_text(self, row: Row) -> str:
        """What the model is given at inference: everything before the (last) answer; nothing for plain text."""
        if is_text(row):
            return ""
        if not self.templated:
            return plain_prompt(row, self.form.model_copy(update={"separator": ""}) if self.apart else self.form)
        talk = asked(row, self.form)
        self._try([talk])
        return rendered(self.tokenizer, [talk], prompt=True)[0]

    @staticmethod
    def reference_text(row: Row) -> str:
        """The (last) answer of a row; all of a plain text; empty where the row has no answer."""
        if is_text(row):
            return row["text"]
        answer = row.get("completion", row["messages"][-1]["content"] if "messages" in row else "")
        return (answer if isinstance(answer, str) else answer[-1]["content"]).strip()

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, exactly those that training saw.

        Raises:
            DataError: a row of plain text, which has no prompt.
        """
        check_prompts(records)
        texts = [self.prompt_text(r.row) for r in records]
        found = self._whole(texts) if self.apart else self.seams.ids(texts)
        for ids in found:
            self.unknown.count(ids)
        return found

    def _whole(self, texts: list[str], **how: Any) -> list[list[int]]:
        """Texts by themselves, with the special tokens that belong to one."""
        how = how or {"text": texts, "add_special_tokens": not self.templated}
        return [list(ids) for ids in self.tokenizer(**how)["input_ids"]] if texts else []

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """All rows. `text` rows are trained whole, prompts are not."""
        return list(self.each(records))

    def each(self, records: Sequence[Record]) -> Iterator[Encoded]:
        """The rows one after another; rendered and tokenised (in parallel) some at a time, so that little is held."""
        for k in range(0, len(records), AT_ONCE):
            some = records[k : k + AT_ONCE]
            if self.apart:
                for one in self._halves(some):
                    self.unknown.count(one.ids[one.prompt_length :])  # prompts have been counted
                    yield one
                continue
            written = self._written(some)
            # of each answer the text before it and the text up to its end, one after another
            pieces = [[piece for pair in marks for piece in pair] for _, marks in written]
            wholes, shares = self.seams.shared([text for text, _ in written], pieces)
            for record, ids, edges in zip(some, wholes, shares, strict=True):
                self.unknown.count(ids)
                yield self._mark(record, ids, list(zip(edges[::2], edges[1::2], strict=True)))

    def _halves(self, records: Sequence[Record]) -> Iterator[Encoded]:
        """Prompts for an encoder, answers for its decoder."""
        prompts = self.prompts(records)
        texts = [self.reference_text(r.row) for r in records]
        answers = self._whole(texts, text_target=texts)
        for record, text, prompt, answer in zip(records, texts, prompts, answers, strict=True):
            if not text:
                raise DataError(
                    "nothing of this row is trained: its answer is empty",
                    where=record.where,
                    do="drop: {empty: true}",
                )
            answer = self._with_end(answer)
            yield Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), record.where, apart=True)

    def _written(self, records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
        """Of each row the text, and for each of its answers the text before it and the text up to its end."""
        if self.templated:
            rendered = iter(self._rendered([r for r in records if not is_text(r.row)]))
            return [(r.row["text"], []) if is_text(r.row) else next(rendered) for r in records]
        out: list[tuple[str, list[tuple[str, str]]]] = []
        for row in (r.row for r in records):
            if is_text(row):
                out.append((row["text"], []))
                continue
            before = plain_prompt(row, self.form)
            text = before + self._plain_answer(row)
            out.append((text, [(before, text)]))
        return out

    def _rendered(self, records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
        """`_written` of conversations."""
        if not records:
            return []
        talks = [conversation(r.row, self.form) for r in records]
        self._try(talks)
        if lacking := next((r for r, t in zip(records, talks, strict=True) if not _answers(t)), None):
            raise DataError(
                f"a conversation without an answer has nothing to train on (its roles: {', '.join(m['role'] for m in conversation(lacking.row, self.form))})",
                where=lacking.where,
                do="drop: {turns: [2, 1000]}, or check its roles",
            )
        texts = rendered(self.tokenizer, talks)
        for token in special_within(self.tokenizer, talks):
            self.intruders[token] += 1
        found = marked(self.tokenizer, talks)
        if found is not None and all(
            plain == text and len(places) == len(_answers(talk))
            for (plain, places), text, talk in zip(found, texts, talks, strict=True)
        ):
            asks = rendered(self.tokenizer, [talk[: _answers(talk)[-1]] for talk in talks], prompt=True)
            for record, text, ask, (_, places) in zip(records, texts, asks, found, strict=True):
                if text[: places[-1][0]] != ask:
                    raise ModelError(
                        "the chat template asks for an answer otherwise than what stands before the answers that it marks",
                        where=f"{record.where}: {ask[-40:]!r} and {text[: places[-1][0]][-40:]!r}",
                        do="let its generation prompt end where {% generation %} begins, or set chat: plain",
                    )
            return [(text, [(text[:a], text[:b]) for a, b in places]) for text, places in found]
        return list(zip(texts, self._between(records, talks, texts), strict=True))

    def _try(self, talks: Sequence[Talk]) -> None:
        """Once, before the template is let loose: the longest of some conversations within bounds."""
        if talks and not self._tried:
            bounded(self.tokenizer, max(talks, key=lambda talk: sum(len(m["content"]) for m in talk)))
            self._tried = True

    def _between(
        self, records: Sequence[Record], talks: Sequence[Talk], texts: Sequence[str]
    ) -> list[list[tuple[str, str]]]:
        """For each answer the text before it and up to its end, from how the template writes what was said until then."""
        answers = [(i, k) for i, talk in enumerate(talks) for k in _answers(talk)]
        befores = rendered(self.tokenizer, [talks[i][:k] for i, k in answers], prompt=True)
        within = [(i, k) for i, k in answers if k + 1 < len(talks[i])]  # up to the last answer it is the text
        uptos = dict(zip(within, rendered(self.tokenizer, [talks[i][: k + 1] for i, k in within]), strict=True))
        marks: list[list[tuple[str, str]]] = [[] for _ in records]
        for (i, k), before in zip(answers, befores, strict=True):
            upto = uptos.get((i, k), texts[i])
            if not (upto.startswith(before) and texts[i].startswith(upto.rstrip("\n"))):
                raise ModelError(
                    "the chat template writes a conversation differently when it goes on, so the answer cannot be found in it",
                    where=f"{records[i].where}, message {k + 1}",
                    do="train on prompt–completion rows (one answer each), mark answers in the template by {% generation %}, or set chat: plain",
                )
            marks[i].append((before, upto.rstrip("\n")))  # a newline after the end token belongs to the next turn
        return marks

    def _mark(self, record: Record, ids: list[int], edges: list[tuple[tuple[int, int], tuple[int, int]]]) -> Encoded:
        """`edges`: for each answer, before it and up to its end, (tokens shared with the whole, tokens of its own)."""
        trained = [False] * len(ids)
        moved = False
        if not edges:  # plain text: all of it, with an end token
            ids = self._with_end(ids)
            return Encoded(ids, [True] * len(ids), record.where)
        for (start, alone), (stop, _) in edges:
            moved |= start < alone
            trained[start:stop] = [True] * (stop - start)
        if not self.templated:
            ids = self._with_end(ids)
            trained = trained + [True] * (len(ids) - len(trained))
        if True not in trained and self.templated and self.reference_text(record.row):
            raise ModelError(
                "the chat template leaves the answer out", where=record.where, do="set chat: plain in the data stage"
            )
        if True not in trained:
            raise DataError(
                "nothing of this row is trained: its answer is empty", where=record.where, do="drop: {empty: true}"
            )
        self._check_end(record, ids, trained)
        return Encoded(ids, trained, record.where, moved)

    def _check_end(self, record: Record, ids: list[int], trained: list[bool]) -> None:
        last = len(trained) - 1 - trained[::-1].index(True)
        if ids[last] not in self.end_ids and ids[last] not in self.seams.special:
            raise ModelError(
                f"the answer does not end with an end token but with {self.tokenizer.decode([ids[last]])!r}: the model would never learn to stop",
                where=record.where,
                do="use a chat template that closes the assistant's turn with one, or set chat: plain",
            )
        self.end_ids.add(ids[last])

    def _with_end(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _plain_answer(self, row: Row) -> str:
        return self.form.separator[len(self.form.separator.rstrip(" ")) :] + row["completion"]


def _answers(talk: Talk) -> list[int]:
    """Places of the assistant's messages."""
    return [k for k, m in enumerate(talk) if m["role"] == "assistant"]


def show(tokenizer: Any, example: Encoded, limit: int = 1200) -> str:
    """An example with the trained part in ⟦ ⟧, as the summary before training prints it."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.ids, example.trained, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = "".join(f"⟦{decode(ids)}⟧" if trained else decode(ids) for trained, ids in runs)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
