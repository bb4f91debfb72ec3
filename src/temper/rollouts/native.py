"""The native sampler: prompts prefilled once, all completions of all live prompts decoded together.

A row is a completion being decoded. Rows leave as soon as they end, and what waits takes their places.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from temper.models import segments
from temper.models.products import sent
from temper.models.scores import head_of
from temper.rollouts import memory as memories
from temper.rollouts.decoding import Draft
from temper.rollouts.distribution import drawn
from temper.rollouts.memory import ROUND, Memory, NotNative, own_attention
from temper.rollouts.products import packed_linears
from temper.trees import rounded

LARGE = 256  # tokens of the longest prompt from which on oneDNN attends faster than MKL, a few rows at a time
PREFILL_TOKENS = 4096  # of one forward pass over prompts
PADDED = 1024  # from so many on padding is looked at
SMALL = (4, 4, 64, 64)  # what memory that grows begins with: slots, prompts, their tokens, new tokens


@dataclasses.dataclass(eq=False)
class _Prompt:
    ids: tuple[int, ...]
    drafts: list[Draft]
    adapter: str | None = None  # of those that the model has for single rows
    place: int = -1
    unfinished: int = 0


@dataclasses.dataclass(eq=False)
class _Row:
    draft: Draft
    prompt: _Prompt
    fed: int = 0  # own tokens that the model has been given; the last one that was sampled is the next


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drafts: list[Draft],
    *,
    slots: int,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write every draft to its end.

    Args:
        prompts: one a draft, token ids; equal ones are computed once.

    Raises:
        NotNative: the model does not use the attention it is given.
    """
    grouped: dict[tuple[int, ...], list[Draft]] = {}
    for ids, draft in zip(prompts, drafts, strict=True):
        grouped.setdefault(tuple(ids), []).append(draft)
    most, longest = max(map(len, grouped.values())), max(map(len, grouped))
    slots = min(slots, len(drafts))
    # Stragglers may hold their prompts while new ones come in: room for twice as many as fill the slots.
    places = min(len(grouped), slots, 2 * -(-slots // most))
    # Most memory is taken at once; prompts come longest first, so that what lies together is of like length.
    memory = Memory(slots, places, longest, max(draft.decoding.max_new_tokens for draft in drafts))
    with opened(model, longest=longest) as switch:
        decoder = Decoder(model, switch, slots=slots, places=places, memory=memory, progress=progress)
        for ids in sorted(grouped, key=lambda ids: -len(ids)):
            decoder.put(ids, grouped[ids])
        while decoder.busy:
            decoder.step()


@contextlib.contextmanager
def opened(model: PreTrainedModel, *, longest: int) -> Iterator[Callable[[bool], None]]:
    """Within, the model decodes natively: what a `Decoder` needs for its steps. Its weights may not change within.

    Args:
        longest: tokens of the longest prompt that is expected.
    """
    with own_attention(model) as switch, packed_linears(model), sent(longest >= LARGE):
        yield switch


class Decoder:
    """Decodes what it is given, in as many slots at most; more may be given, and given up, between any two steps.

    Args:
        switch: what `opened` gave.
        slots: completions decoded together.
        places: prompts whose keys and values are kept at once.
        memory: None: it grows as need be, and is given back when nothing is left to decode.
        adapters: told before each pass which adapter each of its rows has, for a model that has one for each row.
        at_once: prompts are read as they come; else several are waited for, which serves throughput.
        progress: called with a number of newly finished completions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        switch: Callable[[bool], None],
        *,
        slots: int,
        places: int,
        memory: Memory | None = None,
        adapters: Callable[[Sequence[str | None]], Any] | None = None,
        at_once: bool = False,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self.model, self.switch, self.adapters, self.progress = model, switch, adapters, progress
        self.backbone, self.head = head_of(model)
        self.device = next(model.parameters()).device
        self.slots, self.at_once = slots, at_once
        self.growing = memory is None
        self.memory = Memory(*SMALL) if memory is None else memory
        self.waiting: deque[_Prompt] = deque()
        self.ready: deque[_Row] = deque()  # with a first token, waiting for a slot
        self.rows: list[_Row] = []
        self.living: list[_Prompt | None] = [None] * places
        self.seen: torch.Tensor | None = None  # bool [slots, V], for repetition penalties

    @property
    def busy(self) -> bool:
        """Whether there is anything to decode."""
        return bool(self.waiting or self.ready or self.rows)

    def put(self, ids: tuple[int, ...], drafts: list[Draft], adapter: str | None = None) -> None:
        """Drafts of one prompt, to be written as soon as there is room."""
        self.waiting.append(_Prompt(ids, drafts, adapter))

    def step(self) -> None:
        """One token for every row, after what waits has taken the slots that are free.

        Raises:
            NotNative: the model does not use the attention it is given.
        """
        token = memories.use(self.memory)
        try:
            self._drop()
            self._admit()
            if self.rows:
                self._write()
            if self.growing and not self.busy:  # whoever drives it stops here, so there is no later step to do it in
                self.memory, self.seen = Memory(*SMALL), None
        finally:
            memories.leave(token)

    def _drop(self) -> None:
        """Leave out what nobody waits for any more."""
        for slot in reversed([n for n, row in enumerate(self.rows) if row.draft.given_up]):
            self._retire(slot)
        for row in [row for row in self.ready if row.draft.given_up]:
            self.ready.remove(row)
            self._finished(row.prompt)
        for prompt in [p for p in self.waiting if any(d.given_up for d in p.drafts)]:
            prompt.drafts = [d for d in prompt.drafts if not d.given_up]
            if not prompt.drafts:
                self.waiting.remove(prompt)

    def _admit(self) -> None:
        """Fill free slots. Unless they are taken at once, new prompts wait until an eighth of the slots is free, so that
        several are read together; taken at once, one lot of them is read between two tokens of the others."""
        read = False
        while True:
            while self.ready and len(self.rows) < self.slots:
                self._seat(self.ready.popleft(), len(self.rows))
            if read and self.at_once and self.rows:
                return
            free = self.slots - len(self.rows)
            least = 1 if self.at_once or not self.rows else max(1, self.slots // 8)
            if not self.waiting or None not in self.living or free < least:
                return
            self._prefill(self._next(free))
            read = True

    def _next(self, free: int) -> list[_Prompt]:
        """The prompts to be read together: from the first on, of one adapter, for which there is room."""
        first = self.waiting[0]
        taken: list[_Prompt] = []
        room, width, tokens = self.living.count(None), 0, 0
        for prompt in self.waiting:
            if prompt.adapter != first.adapter:
                continue
            wider = max(width, rounded(len(prompt.ids), ROUND))
            both = (len(taken) + 1) * wider
            padded = both > PADDED and both > 2 * (tokens + len(prompt.ids))  # half of it and more
            if taken and (free <= 0 or len(taken) == room or padded or both > PREFILL_TOKENS):
                break
            taken.append(prompt)
            width, tokens, free = wider, tokens + len(prompt.ids), free - len(prompt.drafts)
        for prompt in taken:
            self.waiting.remove(prompt)
        return taken

    def _seat(self, row: _Row, slot: int) -> None:
        if slot == len(self.rows):
            self.rows.append(row)
        else:
            self.rows[slot] = row
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, torch.tensor([*row.prompt.ids, row.draft.latest], device=self.device)] = True

    def _prefill(self, prompts: list[_Prompt]) -> None:
        """Keys and values of new prompts, and the first token of each of their completions."""
        for prompt in prompts:
            prompt.place = self.living.index(None)
            prompt.unfinished = len(prompt.drafts)
            self.living[prompt.place] = prompt
        width = rounded(max(len(p.ids) for p in prompts), ROUND)
        if self.growing:
            self.memory.fit(0, 1 + max(p.place for p in prompts), width, 0)
        for prompt in prompts:
            self.memory.lengths[prompt.place] = len(prompt.ids)
        # Filled up with its last token: some models warn of padding tokens where they see one.
        ids = torch.tensor([[*p.ids, *[p.ids[-1]] * (width - len(p.ids))] for p in prompts])
        last = torch.tensor([n * width + len(p.ids) - 1 for n, p in enumerate(prompts)], device=self.device)
        if self.adapters is not None:
            self.adapters([p.adapter for p in prompts])
        self.switch(False)
        self.memory.filling = [p.place for p in prompts]
        try:
            # No mask: tokens see none that come after them, padding on the right included. Of the last layer all but keys
            # and values is computed where the first tokens are read off, and nowhere else.
            with segments.read_at(self.backbone, last, ids.numel()):
                hidden = self.backbone(
                    input_ids=ids.to(self.device),
                    position_ids=torch.arange(width, device=self.device).expand(len(prompts), -1),
                    past_key_values=self.memory,
                    use_cache=True,
                ).last_hidden_state
        finally:
            self.memory.filling = None
            self.switch(True)
        logits = self._logits(hidden.flatten(0, 1).index_select(0, last))
        rows = [_Row(draft, prompt) for prompt in prompts for draft in prompt.drafts]
        owner = torch.tensor([n for n, p in enumerate(prompts) for _ in p.drafts], device=self.device)
        seen = None
        if any(row.draft.decoding.repetition_penalty != 1 for row in rows):
            if self.seen is None:
                self._watch(logits.shape[-1])
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for n, p in enumerate(prompts):
                seen[n, torch.tensor(p.ids, device=self.device)] = True
            seen = seen.index_select(0, owner)
        for row, over in zip(rows, drawn(logits.index_select(0, owner), [r.draft for r in rows], seen), strict=True):
            if over:
                self._finished(row.prompt)
            else:
                self.ready.append(row)

    def _watch(self, vocabulary: int) -> None:
        """Note from here on which tokens each row has seen."""
        self.seen = torch.zeros(self.slots, vocabulary, dtype=torch.bool, device=self.device)
        for slot, row in enumerate(self.rows):
            self.seen[slot, torch.tensor([*row.prompt.ids, *row.draft.ids], device=self.device)] = True

    def _write(self) -> None:
        """One token for every row."""
        rows, device = self.rows, self.device
        if self.growing:
            self.memory.fit(len(rows), 0, 0, 1 + max(r.fed for r in rows))
        if self.adapters is not None:
            self.adapters([r.prompt.adapter for r in rows])
        self.memory.begin([r.prompt.place for r in rows], [r.fed for r in rows], device)
        hidden = self.backbone(
            input_ids=torch.tensor([[r.draft.latest] for r in rows], device=device),
            position_ids=torch.tensor([[len(r.prompt.ids) + r.fed] for r in rows], device=device),
            past_key_values=self.memory,
            use_cache=True,
        ).last_hidden_state
        if sorted(self.memory.calls) != sorted(self.memory.stored):
            raise NotNative(
                f"{len(self.memory.stored)} layers keep keys and values, and {len(self.memory.calls)} of them attend as told"
            )
        for row in rows:
            row.fed += 1
        seen = self.seen[: len(rows)] if self.seen is not None else None
        over = drawn(self._logits(hidden[:, -1]), [r.draft for r in rows], seen)
        for n in reversed([n for n, ended in enumerate(over) if ended]):
            self._retire(n)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[x, hidden size] → float32 [x, V], through the model's own head."""
        return self.head(inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0].float()

    def _retire(self, slot: int) -> None:
        """Empty a slot; what waits moves in at once, else the last row, so that rows have no holes."""
        self._finished(self.rows[slot].prompt)
        if self.ready:
            self._seat(self.ready.popleft(), slot)
            return
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            self.memory.move_row(len(self.rows), slot, last.fed)
            if self.seen is not None:
                self.seen[slot] = self.seen[len(self.rows)]

    def _finished(self, prompt: _Prompt) -> None:
        if self.progress is not None:
            self.progress(1)
        prompt.unfinished -= 1
        if prompt.unfinished:
            return
        self.living[prompt.place] = None
        if self.waiting:  # its place is taken soon
            return
        last = max((n for n, p in enumerate(self.living) if p is not None), default=-1)
        if last > prompt.place:
            moved = self.living[last]
            assert moved is not None
            self.memory.move_prompt(last, prompt.place)
            moved.place = prompt.place
            self.living[prompt.place], self.living[last] = moved, None
