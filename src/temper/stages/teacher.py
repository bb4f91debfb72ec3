"""A model that is asked for text, wherever it is: weights on this machine, or an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from temper.address import Address
from temper.data.chat import Encoder
from temper.data.forms import Format, asked, check_prompts, plain_prompt
from temper.engine import device as devices
from temper.errors import DataError
from temper.job import Job
from temper.models import adapted, adapters, load
from temper.recipe import ModelRef
from temper.rollouts.decoding import Decoding
from temper.rollouts.endpoint import Answer, Endpoint, Prompt
from temper.rollouts.sampler import Sampler
from temper.types import Record

Progress = Callable[[int], Any]


class Teacher(Protocol):
    """Answers prompts. What it draws is a function of (seed, number, attempt) and the prompt."""

    def ask(
        self, records: Sequence[Record], numbers: Sequence[int], attempt: int = 0, progress: Progress | None = None,
        way: Decoding | None = None,
    ) -> list[Answer]:  # fmt: skip
        """Answers to rows with a prompt, in their order, without white space around them.

        Args:
            way: how to decode; None: as it was told when it was opened.
        """
        ...


class Served:
    """A model behind an endpoint: conversations by its chat, the plain form as text to go on from."""

    def __init__(self, job: Job, address: Address, form: Format, decoding: Decoding, *, concurrency: int) -> None:
        self.form, self.decoding, self.seed = form, decoding, job.seed
        self.endpoint = Endpoint(address, concurrency=concurrency, tell=lambda text: job.say(text, "yellow"))
        self.job = job
        job.facts["endpoint"] = f"{address} ({'completions' if form.chat == 'plain' else 'chat'})"

    def prompt(self, record: Record) -> Prompt:
        """What is sent: text in the plain form, else messages."""
        return plain_prompt(record.row, self.form) if self.form.chat == "plain" else asked(record.row, self.form)

    def ask(
        self, records: Sequence[Record], numbers: Sequence[int], attempt: int = 0, progress: Progress | None = None,
        way: Decoding | None = None,
    ) -> list[Answer]:  # fmt: skip
        check_prompts(records)
        prompts = [self.prompt(r) for r in records]
        before = self.endpoint.troubles.copy()
        found = self.endpoint.answer(
            prompts, way or self.decoding, seed=self.seed, step=attempt, numbers=numbers, progress=progress
        )
        if again := self.endpoint.troubles - before:
            what = ", ".join(f"{kind} {n}" for kind, n in again.most_common())
            self.job.say(f"the endpoint had to be asked again: {what}", "yellow")
        return found


class Local:
    """A model on this machine."""

    def __init__(
        self, job: Job, ref: ModelRef, form: Format, decoding: Decoding, *,
        precision: devices.Precision, attention: load.Attention, batch_size: int,
    ) -> None:  # fmt: skip
        self.name, self.decoding, self.seed = ref, decoding, job.seed
        self.device = devices.of(job.recipe)
        self.precision = devices.precision(precision, self.device)
        source, trust = job.model(ref), job.recipe.trust_remote_code
        self.tokenizer = load.tokenizer(source, trust_remote_code=trust)
        dtype = devices.DTYPES[self.precision] if self.device.type == "cuda" else torch.float32
        hf, notices = adapters.open_model(
            source, dtype=dtype, attention=attention, device=self.device, trust_remote_code=trust
        )
        for notice in notices:
            job.warn(notice)
        inner = adapted.inner(hf)
        self.encoder = Encoder(self.tokenizer, form, end_ids=load.end_ids(inner), apart=inner.config.is_encoder_decoder)
        self.inner, self.virtual = inner, adapted.virtual(hf)
        with devices.autocast(self.device, self.precision):
            self.sampler = Sampler(hf, self.tokenizer, end_ids=self.encoder.end_ids, slots=batch_size)
        job.say(f"{ref} answers: {self.sampler.reason}; asked as {self.encoder.description}")
        job.facts.update(precision=self.precision, device=str(self.device), threads=torch.get_num_threads())

    def ask(
        self, records: Sequence[Record], numbers: Sequence[int], attempt: int = 0, progress: Progress | None = None,
        way: Decoding | None = None,
    ) -> list[Answer]:  # fmt: skip
        prompts, decoding = self.encoder.prompts(records), way or self.decoding
        for record, prompt in zip(records, prompts, strict=True):
            if not load.has_room(self.inner, self.virtual + len(prompt), decoding.max_new_tokens):
                raise DataError(
                    f"a prompt of {len(prompt)} tokens leaves no room for an answer of {decoding.max_new_tokens} "
                    f"in the context of {self.name} ({load.context(self.inner)})",
                    where=record.where,
                    do="drop: {longer_than: …} in the data stage, or a smaller decoding.max_new_tokens",
                )
        with devices.autocast(self.device, self.precision):
            found = self.sampler.sample(
                prompts, decoding, seed=self.seed, step=attempt, numbers=numbers, progress=progress
            )
        texts = [
            c.text if c.text is not None else self.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in found
        ]
        return [Answer(text.strip(), c.ended) for text, (c,) in zip(texts, found, strict=True)]
