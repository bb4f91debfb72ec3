"""Keys and values while completions are decoded: a prompt's once for all its completions, each completion's own in
memory taken beforehand; and the attention over both, one softmax.

Legend: R rows decoded now, N prompts they belong to, K most rows of one prompt, H query heads, J key heads, G = H / J,
D head size, P prompt tokens, T own tokens.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from temper.trees import rounded

NAME = "temper_rollout"
ROUND = 32  # own tokens and prompts are looked at in so many at a time: matrix libraries like few shapes



class NotNative(Exception):
    """This model does not take the native sampler's attention."""


# The attention function is called by the model, layer by layer, and some models pass on no arguments of their own.
_current: contextvars.ContextVar[Memory] = contextvars.ContextVar("rollout memory")


@dataclasses.dataclass
class _Layer:
    prompt: tuple[torch.Tensor, torch.Tensor]  # keys and values [prompt slots, J, longest prompt, D]
    own: tuple[torch.Tensor, torch.Tensor]  # keys and values [slots, J, new tokens, D]


class Memory(Cache):
    """All layers' keys and values; and who is decoded in the step under way.

    Rows are 0 … R − 1 without holes, prompts 0 … N − 1.
    """

    def __init__(self, slots: int, prompts: int, longest: int, new_tokens: int) -> None:
        super().__init__(layers=[])
        self.sizes = (slots, prompts, rounded(longest, ROUND), rounded(new_tokens, ROUND))
        self.stored: dict[int, _Layer] = {}
        self.lengths: list[int] = [0] * prompts
        self.filling: list[int] | None = None  # prompt slots that a prefill fills, one a lane
        self.calls: list[int] = []  # layers that the attention function was called for in this step
        self.layer = 0

    def fit(self, slots: int, prompts: int, longest: int, new_tokens: int) -> None:
        """Make room for as much, twice as much as before at least where there is too little; what is there stays."""
        wanted = (slots, prompts, rounded(longest, ROUND), rounded(new_tokens, ROUND))
        if all(w <= s for w, s in zip(wanted, self.sizes, strict=True)):
            return
        self.sizes = slots, prompts, longest, new_tokens = tuple(  # type: ignore[assignment]
            s if w <= s else max(w, 2 * s) for w, s in zip(wanted, self.sizes, strict=True)
        )
        self.lengths += [0] * (prompts - len(self.lengths))
        for layer in self.stored.values():
            layer.prompt = tuple(_enlarged(x, prompts, longest) for x in layer.prompt)  # type: ignore[assignment]
            layer.own = tuple(_enlarged(x, slots, new_tokens) for x in layer.own)  # type: ignore[assignment]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0  # asked while a prefill's mask is made; decoding has none

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what one layer made [R, J, tokens, D] of a prefill's prompts, or of the one new token of every row."""
        made = (key_states, value_states)
        if layer_idx not in self.stored:
            slots, prompts, longest, new_tokens = self.sizes
            # zeros, not empty: a weight of 0 on what was never written must give 0
            self.stored[layer_idx] = _Layer(
                *(
                    tuple(x.new_zeros(places, x.shape[1], width, x.shape[3]) for x in made)  # type: ignore[arg-type]
                    for places, width in ((prompts, longest), (slots, new_tokens))
                )
            )
        layer = self.stored[layer_idx]
        if self.filling is not None:
            for store, x in zip(layer.prompt, made, strict=True):
                for lane, place in enumerate(self.filling):
                    n = self.lengths[place]
                    store[place, :, :n] = x[lane, :, :n]
            return made
        for store, x in zip(layer.own, made, strict=True):
            if self.together:
                store[: self.rows, :, self.at[0]] = x[:, :, 0]
            else:
                store[self.row_index, :, self.at_index] = x[:, :, 0].to(store.dtype)
        self.layer = layer_idx
        return made

    def begin(self, owners: Sequence[int], at: Sequence[int], device: torch.device) -> None:
        """A step: row r belongs to prompt owners[r], and its new token is its own at[r]-th."""
        self.rows, self.at = len(owners), list(at)
        self.together = len(set(at)) == 1
        self.row_index = torch.arange(self.rows, device=device)
        self.at_index = torch.tensor(self.at, device=device)
        self.calls, self._masks = [], {}
        self._arrange(owners, device)

    def _arrange(self, owners: Sequence[int], device: torch.device) -> None:
        """Rows as a grid [N, K] by prompt: cell → row, and row → cell; None where they are the same already."""
        members: list[list[int]] = [[] for _ in range(max(owners) + 1)]
        for row, owner in enumerate(owners):
            members[owner].append(row)
        self.N, self.K = len(members), max(map(len, members))
        cells = [row for m in members for row in (m + [m[0] if m else 0] * (self.K - len(m)))]
        if cells == list(range(self.rows)):
            self.row_of = self.cell_of = None
            return
        self.row_of = torch.tensor(cells, device=device)
        cell_of = [0] * self.rows
        for n, m in enumerate(members):
            for k, row in enumerate(m):
                cell_of[row] = n * self.K + k
        self.cell_of = torch.tensor(cell_of, device=device)

    def to_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, J, G, x] → [N, J, K, G, x]."""
        cells = rows if self.row_of is None else rows.index_select(0, self.row_of)
        return cells.unflatten(0, (self.N, self.K)).transpose(1, 2)

    def to_rows(self, grid: torch.Tensor) -> torch.Tensor:
        """[N, J, K, G, x] → [R, J, G, x]."""
        cells = grid.transpose(1, 2).flatten(0, 1)
        return cells if self.cell_of is None else cells.index_select(0, self.cell_of)

    def view(self, window: int | None, device: torch.device) -> tuple[slice, slice, torch.Tensor]:
        """What a layer with this window looks at: prompt tokens, own tokens, and a mask [N, 1, K, 1, both] to add.

        The same for all layers of a kind, so made once a step.
        """
        if window not in self._masks:
            lengths = torch.tensor(self.lengths[: self.N], device=device)[:, None, None]  # [N, 1, 1]
            at = self.at_index if self.row_of is None else self.at_index.index_select(0, self.row_of)
            at = at.view(self.N, self.K, 1)
            longest, shortest = max(self.lengths[: self.N]), min(self.lengths[: self.N])
            stop = rounded(longest, ROUND)
            first = 0 if window is None else max(0, shortest + min(self.at) + 1 - window) // ROUND * ROUND
            prompt, own = slice(min(first, stop - ROUND), stop), slice(0, rounded(max(self.at) + 1, ROUND))
            j = torch.arange(prompt.start, prompt.stop, device=device)
            i = torch.arange(own.start, own.stop, device=device)
            before, after = (j < lengths).expand(self.N, self.K, -1), i <= at
            if window is not None:
                before, after = before & (lengths + at - j < window), after & (at - i < window)
            seen = torch.cat([before, after], -1)
            mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            self._masks[window] = prompt, own, mask[:, None, :, None]
        return self._masks[window]

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """A row's own keys and values to another slot."""
        for layer in self.stored.values():
            for store in layer.own:
                store[target, :, :tokens] = store[source, :, :tokens]

    def move_prompt(self, source: int, target: int) -> None:
        n = self.lengths[target] = self.lengths[source]
        for layer in self.stored.values():
            for store in layer.prompt:
                store[target, :, :n] = store[source, :, :n]


def _enlarged(store: torch.Tensor, places: int, width: int) -> torch.Tensor:
    """A store [places, J, tokens, D] in a larger one."""
    if store.shape[0] >= places and store.shape[2] >= width:
        return store
    out = store.new_zeros(places, store.shape[1], width, store.shape[3])
    out[: store.shape[0], :, : store.shape[2]] = store
    return out


def use(memory: Memory) -> contextvars.Token[Memory]:
    """Attend over this memory until `leave`."""
    return _current.set(memory)


def leave(token: contextvars.Token[Memory]) -> None:
    _current.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [R, H, 1, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each row's new token over its prompt and its own tokens, [R, 1, H, D]."""
    return _attended(_current.get(), query, scaling, sliding_window, softcap, s_aux, position_bias), None


def _attended(
    memory: Memory,
    query: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    if position_bias is not None or query.shape[2] != 1:
        raise ValueError("this attention takes one token a row, and no biases")
    layer = memory.stored[memory.layer]
    memory.calls.append(memory.layer)
    prompt, own, mask = memory.view(window, query.device)
    pk, pv = (x[: memory.N, :, prompt] for x in layer.prompt)  # [N, J, P, D]
    ok, ov = (x[: memory.rows, :, own] for x in layer.own)  # [R, J, T, D]
    rows, heads, _one, size = query.shape
    groups = heads // pk.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    q = query.view(rows, -1, groups, size).to(pk.dtype)
    if q.dtype == torch.float32:  # halves are scaled after the product, where they are float32
        q, scale = q * scale, 1.0
    on_prompt = memory.to_grid(q).flatten(2, 3) @ pk.transpose(2, 3)  # [N, J, K·G, P]
    on_own = memory.to_grid(q @ ok.transpose(2, 3))  # [N, J, K, G, T]
    scores = torch.cat([on_prompt.unflatten(2, (memory.K, groups)), on_own], -1).float()
    if scale != 1:
        scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, groups, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    over_prompt, over_own = weights.to(pv.dtype).split([on_prompt.shape[-1], on_own.shape[-1]], -1)
    out = memory.to_rows((over_prompt.flatten(2, 3) @ pv).unflatten(2, (memory.K, groups)))  # [R, J, G, D]
    out = out + memory.to_rows(over_own) @ ov
    return out.reshape(rows, 1, heads, -1).to(query.dtype)


AttentionInterface.register(NAME, _attend)


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[Callable[[bool], None]]:
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
            model.set_attn_implementation(NAME)
        finally:
            transformers.logging.set_verbosity(level)
        if model.config.get_text_config()._attn_implementation != NAME:
            raise NotNative(f"{model.config.model_type} has an attention of its own")
        after = [(c, c._attn_implementation) for c in configs.values()]

        def switch(ours: bool) -> None:
            for config, name in after if ours else before:
                config._attn_implementation_internal = name

        yield switch
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
