"""What one process of a training run holds at its fullest, from shapes alone.

A micro-batch goes forwards and backwards through the real model and the real `Policy` on fake tensors, which have shapes and
no memory, while every piece of memory that is taken or given back is noted (`heap`). What FSDP2 gathers and scatters is
noted beside it, where its hooks would be. So what autograd keeps, what lies between and what is there at once is not
modelled but counted. Attention alone is replaced by something that keeps what attention keeps: masks hang on contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import AttentionInterface

from temper.engine import device as devices
from temper.engine.settings import ON_A_CARD
from temper.errors import ModelError
from temper.models import adapted, adapters, products, quantized, remade, segments, seq2seq
from temper.models.methods import Adapter
from temper.models.scores import Policy, chunk_of, head_of
from temper.scaling.gathering import Gathering
from temper.scaling.heap import Heap, Noted
from temper.trees import Row, chain, join
from temper.world import Parallel

# Bytes that an optimiser keeps for each trained weight; Adafactor's rows and columns are next to nothing.
MOMENTS = {"adamw": 8.0, "sgd": 0.0, "adafactor": 0.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
BUCKETS = (2**20, 25 * 2**20)  # bytes of DDP's first bucket of gradients, and of each other one
SYNC = 2 * 250 * 2**20  # bytes of weights that DDP sends round at once when it begins
ATTENTION = "temper_shapes"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory hangs on it.

    `tokens` of a micro-batch; `width`: tokens of an example, of which the share `scored` has its logits made; `passes`:
    micro-batches of a process in a step; `cards`: as on graphics cards, else as on processors.
    """

    tokens: int
    width: int = 256
    scored: float = 1.0
    passes: int = 1
    precision: str = "float32"
    cards: bool = False
    recompute: bool = False
    optimizer: str = "adamw"
    adapter: Adapter | None = None
    held: quantized.Held | None = None


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of one process in the moment when it holds most: gradients come as activations go.

    `exchanged`: DDP's buckets, or what FSDP2 holds of whole layers beside its shards; `holes`: what the heap of a processor
    keeps between tensors; `start`: before the first step, when every process has read the whole model, which FSDP2 then spreads.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    exchanged: float
    start: float
    holes: float = 0.0

    @property
    def total(self) -> float:
        step = self.weights + self.gradients + self.optimizer + self.activations + self.exchanged + self.holes
        return max(step, self.start)


class _Shapes(Policy):
    """A policy whose rows have lengths and no content."""

    cards, keys = False, 0

    def _tree(self, model: Any, backbone: nn.Module, row: Any) -> torch.Tensor:
        """As in `Policy`, but for masks, which hang on the row's content: attention here takes none."""
        ids = row.ids.view(1, -1)
        given: dict[str, Any] = {"input_ids": ids}
        if adapted.virtual(self.hf):  # whatever they are, gradients flow back to them through every layer
            given = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}
        mask: Any = torch.ones((), dtype=torch.bool).expand(1, 1, ids.shape[1], ids.shape[1])
        mask.kept = self.keys
        with contextlib.ExitStack() as stack:
            if not self.cards:
                stack.enter_context(products.own_products(self.hf, self._halves))
                stack.enter_context(remade.kept_less(self.hf))
            out = backbone(**given, position_ids=row.pos.view(1, -1), attention_mask=mask, use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, row.src)  # type: ignore[no-any-return]

    def _hidden(self, row: Row) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Of an encoder–decoder prompts and answers stand in as many lines, as `seq2seq` has them."""
        if not self.apart:
            return super()._hidden(row)
        model, (_, head), scored = self.inner, head_of(self.inner), len(row.tgt)
        lines = max(1, len(row.ids) // seq2seq.LANE)
        prompts, answers = (row.ids.new_zeros(lines, max(1, n // lines)) for n in (len(row.ids) - scored, scored))
        with products.own_products(self.hf, self._halves), remade.kept_less(self.hf):
            read = model.get_encoder()(input_ids=prompts).last_hidden_state
            out = model.get_decoder()(input_ids=answers, encoder_hidden_states=read, use_cache=False)
        states = out.last_hidden_state.flatten(0, 1)

        def logits(h: torch.Tensor) -> torch.Tensor:
            given: Any = {"decoder_inputs_embeds": h[None], "encoder_outputs": (h[None],)}
            return head(**given, use_cache=False).logits.squeeze(0).float()  # type: ignore[no-any-return]

        return torch.nn.functional.pad(states, (0, 0, 0, scored - len(states))), logits

    @property
    def chunk(self) -> int:
        return chunk_of(self.inner.config.get_text_config().vocab_size, cards=self.cards)


class _Attended(torch.autograd.Function):
    """Keeps what attention keeps: a log-sum a query in the kernels of cards, probabilities on processors."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int) -> torch.Tensor:
        """Of [1, heads, T, D]; `keys` whose probabilities are kept for each query, 0: none."""
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        rest = q.new_empty(q.shape[1], q.shape[2], keys) if keys else q.new_empty(q.shape[1:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, rest, *([] if keys else [out]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _Attended.apply(query, key, value, mask.kept), None  # type: ignore[return-value]


AttentionInterface.register(ATTENTION, _attend)


def _keys(setting: Setting) -> int:
    """Keys whose probabilities a token keeps on a processor; see `segments`."""
    width = max(setting.width, segments.LEAST)
    scores = sum((b - a) * b for a, b in segments.blocks(torch.ones(width, width).tril().bool()))
    return 0 if setting.cards or scores > segments.KEPT * width else round(scores / width)


def setting_of(stage: Any, n: int, *, width: float, scored: float, row: float | None, precision: str, cards: bool) -> Setting:
    """How `n` processes train a stage.

    Args:
        width: tokens of an example, scored as a share of it.
        row: tokens of an example of a batch, by which those of a step are counted; None: one full micro-batch a process.
    """
    most = stage.micro_tokens if not cards or "micro_tokens" in stage.model_fields_set else ON_A_CARD
    each, wide = float(most), max(1, round(width))
    if row is not None:
        each = max(row, stage.batch_size * stage.accumulation * getattr(stage, "completions", 1) * row / n)
    return Setting(
        tokens=max(wide, round(min(most, each))), width=wide, scored=scored, passes=max(1, math.ceil(each / most)), precision=precision,
        cards=cards, recompute=stage.activation_checkpointing, optimizer=stage.optimizer, adapter=getattr(stage, "adapter", None),
        held=getattr(stage, "quantize", None),
    )  # fmt: skip


def of(make: Callable[[], Any], setting: Setting, parallel: Parallel | None = None, size: int = 1) -> Footprint:
    """What each of `size` processes holds.

    Args:
        make: a model whose weights may be left empty.

    Raises:
        ModelError: the model cannot take the adapter; or it is a mixture of experts.
    """
    last = _noted(make, setting, parallel, size)
    shared = size if parallel == "fsdp" else 1
    trained, most = 4.0 * sum(last.trained), last.noted.most()
    buckets = trained if parallel == "ddp" else 0.0
    moments = MOMENTS[setting.optimizer] / 4 * trained / shared
    start = last.weights * (1 + (1 / size if parallel == "fsdp" else 0)) + (min(SYNC, last.weights) if parallel == "ddp" else 0)
    found = Footprint(last.weights / shared, most["gradients"], moments, most["activations"], most["exchanged"] + buckets, start)
    if setting.cards or parallel == "fsdp" or setting.held:  # no heap, or one that keeps nothing
        return found
    once, again = (
        last if setting.passes == n else _noted(make, dataclasses.replace(setting, passes=n), parallel, size) for n in (1, 2)
    )
    top = _heap(once, again, setting, parallel)
    return dataclasses.replace(found, holes=max(0.0, last.weights + top - found.total))


@dataclasses.dataclass
class _Pass:
    """One micro-batch: what was noted, bytes of all weights, and the numbers of each tensor that is trained."""

    noted: Noted
    weights: float
    trained: list[int]


def _noted(make: Callable[[], Any], setting: Setting, parallel: Parallel | None, size: int) -> _Pass:
    """The last micro-batch of a step, forwards and backwards."""
    noted, row, keys = Noted(), _row(setting), _keys(setting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not there
        with torch.device("meta"):
            policy = _opened(make, setting)
        policy.keys = keys
        _tried(policy)
        linear = [m.weight for m in policy.inner.modules() if isinstance(m, nn.Linear)]
        frozen = sum(p.numel() * p.element_size() for p in linear if not p.requires_grad)
        every = float(sum(p.numel() * p.element_size() for p in policy.parameters()))
        few = frozen * (quantized.BYTES[setting.held] / 4 - 1) if setting.held else 0.0
        with FakeTensorMode(allow_non_fake_inputs=True):
            _filled(policy)
            trained = [p for p in policy.parameters() if p.requires_grad]
            for tensor in [*policy.parameters(), *policy.buffers()]:
                noted.piece(tensor)
            noted.events.clear()  # they are there from the beginning, and to the end
            with noted:
                _forth_and_back(noted, policy, row, setting, parallel, size)
            for p in trained:  # those of a step that is through, told from what lay between
                if p.grad is not None:
                    noted.piece(p.grad, "gradients")
            noted.closed = True  # gradients stay: what goes with this function is noted no more
    return _Pass(noted, every + few, [p.numel() for p in trained])


def _heap(once: _Pass, again: _Pass, setting: Setting, parallel: Parallel | None) -> float:
    """The top of a processor's heap, in which weights do not lie: they are mapped from their file.

    As in a stage: two passes that measure, then steps; moments come with the first.
    """
    heap, moment = Heap(), MOMENTS[setting.optimizer] / 2
    first, later = once.noted.events, again.noted.events[len(again.trained) :]  # whose gradients those of `first` are
    if parallel == "ddp":
        heap.take("sync", min(SYNC, once.weights))
        heap.give("sync")
        heap.hold("buckets", _buckets(once.trained))
    heap.play("probe", first)
    heap.play("probe again", later)
    heap.drop("probe")
    heap.drop("probe again")
    for step in range(3):
        heap.play("step", first)
        if setting.passes > 1:
            heap.play("more", later)
        if step == 0 and moment:
            heap.hold("moments", [moment * n for n in once.trained for _ in range(2)])
        heap.drop("step")
        heap.drop("more")
    return float(heap.most)


def _buckets(trained: list[int]) -> list[float]:
    """Bytes of DDP's buckets: gradients in the order in which they come, up to a size."""
    out, filled = list[float](), 0.0
    for n in reversed(trained):
        filled += 4.0 * n
        if filled >= BUCKETS[bool(out)]:
            out.append(filled)
            filled = 0.0
    return [*out, filled]


def _tried(policy: Policy) -> None:
    """What `models` finds out by trying is found out on real tensors, before it meets fake ones."""
    for dtype in products.DTYPES:
        products.sound(dtype)
    for module in policy.modules():
        for tried in (remade.is_norm, remade.is_gated):
            tried(module)


def _row(setting: Setting) -> Row:
    """A micro-batch of equal examples, whose last tokens are scored."""
    width = min(setting.width, setting.tokens)
    scored = max(1, round(setting.scored * width))
    one = chain([0] * width, [0.0] * (width - scored) + [1.0] * scored)
    return join([one] * max(1, setting.tokens // width))


def _filled(model: nn.Module) -> None:
    """Put fake tensors of the processor in the place of those of the device meta, on which autocast does nothing."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = made[id(p)] if id(p) in made else nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)] = fake
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _opened(make: Callable[[], Any], setting: Setting) -> _Shapes:
    """The policy as `stages.training.open_policy` has it."""
    hf = make()
    if setting.adapter is not None:
        if setting.cards and setting.precision != "float32":
            hf = hf.to(devices.DTYPES[setting.precision])
        hf = adapters.attach(hf, setting.adapter.model_copy(update={"text": None}), seed=0)
        for parameter in hf.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if setting.recompute:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = _Shapes(hf)
    policy.cards = setting.cards
    if any("experts" in name for name, _ in policy.inner.named_modules()):
        raise ModelError(
            f"what {policy.inner.config.model_type} computes hangs on the content of its tokens, which choose experts: shapes alone do "
            "not tell its memory and time",
            do="run a step of it, and look at peak_memory_bytes in stage.json",
        )
    if not policy.apart:  # whose attention is transformers' own
        policy.inner.set_attn_implementation(ATTENTION)
    policy.train()
    return policy


def _forth_and_back(noted: Noted, policy: _Shapes, row: Row, setting: Setting, parallel: Parallel | None, size: int) -> None:
    if parallel == "fsdp":
        Gathering(noted, policy, size, gloo=not setting.cards)
    for p in policy.parameters():
        if p.requires_grad and setting.passes > 1:  # earlier passes have left gradients
            if parallel == "fsdp":
                noted.hold(4.0 * p.numel() / size, "gradients")
            else:
                p.grad = torch.empty_like(p)
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(parallel != "fsdp")
    try:
        with devices.autocast(torch.device("cpu"), setting.precision):
            loss = policy(row).sum()
    finally:
        torch.set_autocast_cache_enabled(before)
    with products.added_in_place(size == 1):
        loss.backward()
