"""The native sampler: prompts prefilled once, all completions of all live prompts decoded together.

A row is a completion being decoded. Rows leave as soon as they end, and what waits takes their places.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from temper.models import segments
from temper.models.products import sent
from temper.models.scores import head_of
from temper.rollouts import memory as memories
from temper.rollouts.decoding import Draft
from temper.rollouts.distribution import draw, held_open
from temper.rollouts.memory import ROUND, Memory
from temper.rollouts.products import packed_linears
from temper.trees import rounded

LARGE = 256  # tokens of the longest prompt from which on oneDNN attends faster than MKL, a few rows at a time
PREFILL_TOKENS = 4096  # of one forward pass over prompts


class NotNative(Exception):
    """This model does not take the native sampler's attention."""


@dataclasses.dataclass
class _Prompt:
    ids: tuple[int, ...]
    drafts: list[int]
    place: int = -1
    unfinished: int = 0


@dataclasses.dataclass
class _Row:
    draft: int
    prompt: _Prompt
    token: int  # sampled, not yet given to the model
    fed: int = 0  # own tokens that the model has been given


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    drafts: list[Draft],
    *,
    slots: int,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write every draft to its end.

    Args:
        prompts: one a draft, token ids; equal ones are computed once.
        noise: float64 [drafts, max_new_tokens].

    Raises:
        NotNative: the model does not use the attention it is given.
    """
    grouped: dict[tuple[int, ...], _Prompt] = {}
    for k, ids in enumerate(prompts):
        grouped.setdefault(tuple(ids), _Prompt(tuple(ids), [])).drafts.append(k)
    large = max(map(len, grouped)) >= LARGE
    with _own_attention(model) as switch, packed_linears(model), sent(large):
        _Decoder(model, switch, list(grouped.values()), noise, drafts, slots, progress).run()


class _Decoder:
    def __init__(
        self,
        model: PreTrainedModel,
        switch: Callable[[bool], None],
        prompts: list[_Prompt],
        noise: np.ndarray,
        drafts: list[Draft],
        slots: int,
        progress: Callable[[int], Any] | None,
    ) -> None:
        self.model, self.switch, self.drafts, self.progress = model, switch, drafts, progress
        self.backbone, self.head = head_of(model)
        self.device = next(model.parameters()).device
        self.decoding = drafts[0].decoding
        self.slots = min(slots, len(drafts))
        most = max(len(p.drafts) for p in prompts)
        # Stragglers may hold their prompts while new ones come in: room for twice as many as fill the slots.
        self.places = min(len(prompts), self.slots, 2 * -(-self.slots // most))
        # Longest first: what lies in memory together is of like length, and most memory is taken at once.
        self.waiting = deque(sorted(prompts, key=lambda p: -len(p.ids)))
        self.noise = torch.from_numpy(noise)
        longest = max(len(p.ids) for p in prompts)
        self.memory = Memory(self.slots, self.places, longest, self.decoding.max_new_tokens)
        self.ready: deque[_Row] = deque()  # with a first token, waiting for a slot
        self.rows: list[_Row] = []
        self.living: list[_Prompt | None] = [None] * self.places
        self.seen: torch.Tensor | None = None  # bool [slots, V], for the repetition penalty

    def run(self) -> None:
        token = memories.use(self.memory)
        try:
            while self.waiting or self.ready or self.rows:
                self._admit()
                if self.rows:
                    self._step()
        finally:
            memories.leave(token)

    def _admit(self) -> None:
        """Fill free slots. New prompts wait until an eighth of the slots is free, so that several are prefilled at once."""
        while True:
            while self.ready and len(self.rows) < self.slots:
                self._seat(self.ready.popleft(), len(self.rows))
            free = self.slots - len(self.rows)
            if not self.waiting or None not in self.living or free < (1 if not self.rows else max(1, self.slots // 8)):
                return
            taken: list[_Prompt] = []
            width = rounded(len(self.waiting[0].ids), ROUND)
            room = self.living.count(None)
            while (
                self.waiting
                and free > 0
                and len(taken) < room
                and (len(taken) + 1) * width <= max(PREFILL_TOKENS, width)
            ):
                taken.append(self.waiting.popleft())
                free -= len(taken[-1].drafts)
            self._prefill(taken)

    def _seat(self, row: _Row, slot: int) -> None:
        if slot == len(self.rows):
            self.rows.append(row)
        else:
            self.rows[slot] = row
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, torch.tensor([*row.prompt.ids, row.token], device=self.device)] = True

    def _prefill(self, prompts: list[_Prompt]) -> None:
        """Keys and values of new prompts, and the first token of each of their completions."""
        for prompt in prompts:
            prompt.place = self.living.index(None)
            prompt.unfinished = len(prompt.drafts)
            self.living[prompt.place] = prompt
            self.memory.lengths[prompt.place] = len(prompt.ids)
        width = rounded(max(len(p.ids) for p in prompts), ROUND)
        # Filled up with its last token: some models warn of padding tokens where they see one.
        ids = torch.tensor([[*p.ids, *[p.ids[-1]] * (width - len(p.ids))] for p in prompts])
        last = torch.tensor([n * width + len(p.ids) - 1 for n, p in enumerate(prompts)], device=self.device)
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
        owner = torch.tensor([n for n, p in enumerate(prompts) for _ in p.drafts], device=self.device)
        drafts = [d for p in prompts for d in p.drafts]
        seen = None
        if self.decoding.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros(self.slots, logits.shape[-1], dtype=torch.bool, device=self.device)
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for n, p in enumerate(prompts):
                seen[n, torch.tensor(p.ids, device=self.device)] = True
            seen = seen.index_select(0, owner)
        logits = logits.index_select(0, owner)
        limited = held_open(logits, [self.drafts[d] for d in drafts])
        first = draw(logits, self.noise[drafts, 0].to(self.device), self.decoding, seen, limited)
        owners = [p for p in prompts for _ in p.drafts]
        for draft, prompt, token, logp, raw in zip(drafts, owners, *(x.tolist() for x in first), strict=True):
            if self.drafts[draft].add(token, logp, raw):
                self._finished(prompt)
            else:
                self.ready.append(_Row(draft, prompt, token))

    def _step(self) -> None:
        """One token for every row."""
        rows, device = self.rows, self.device
        self.memory.begin([r.prompt.place for r in rows], [r.fed for r in rows], device)
        hidden = self.backbone(
            input_ids=torch.tensor([[r.token] for r in rows], device=device),
            position_ids=torch.tensor([[len(r.prompt.ids) + r.fed] for r in rows], device=device),
            past_key_values=self.memory,
            use_cache=True,
        ).last_hidden_state
        if sorted(self.memory.calls) != sorted(self.memory.stored):
            raise NotNative(
                f"{len(self.memory.stored)} layers keep keys and values, and {len(self.memory.calls)} of them attend as told"
            )
        noise = self.noise[[r.draft for r in rows], [r.fed + 1 for r in rows]].to(device)
        seen = self.seen[: len(rows)] if self.seen is not None else None
        logits = self._logits(hidden[:, -1])
        limited = held_open(logits, [self.drafts[r.draft] for r in rows])
        tokens, logps, raws = draw(logits, noise, self.decoding, seen, limited)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        over = []
        for n, (row, token, logp, raw) in enumerate(
            zip(rows, tokens.tolist(), logps.tolist(), raws.tolist(), strict=True)
        ):
            row.token, row.fed = token, row.fed + 1
            if self.drafts[row.draft].add(token, logp, raw):
                over.append(n)
        for n in reversed(over):
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


@contextlib.contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[Callable[[bool], None]]:
    """Our attention within the model; `switch(False)` brings back its own for a prefill. Restored in any case.

    Raises:
        NotNative: the model keeps its own.
    """
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), type(model.config))}
    configs |= {id(c): c for c in (model.config, model.config.get_text_config())}
    before = [(c, c._attn_implementation) for c in configs.values()]
    try:
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # what is refused is said by us
        try:
            model.set_attn_implementation(memories.NAME)
        finally:
            transformers.logging.set_verbosity(level)
        if model.config.get_text_config()._attn_implementation != memories.NAME:
            raise NotNative(f"{model.config.model_type} has an attention of its own")
        after = [(c, c._attn_implementation) for c in configs.values()]

        def switch(ours: bool) -> None:
            for config, name in after if ours else before:
                config._attn_implementation_internal = name

        yield switch
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
