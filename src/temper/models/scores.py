"""Log-probabilities of scored tokens: the one module through which every training and scoring pass goes.

`Policy.forward(row)` is backbone → hidden states at `src` → the model's own head in checkpointed chunks. Only this
module is wrapped for several processes; nothing calls the inner model past it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from temper.models import adapted, flex, segments, seq2seq
from temper.models.attention import Carrier, tree_mask, widened
from temper.models.products import Halves, own_products
from temper.models.remade import kept_less
from temper.trees import Row, rooted, rounded

Layout = Literal["tree", "padded"]
CHUNK_LOGITS = 8 * 2**20  # logits made at once, by default 8 M: 32 MiB in float32, whatever the vocabulary
ON_CARDS = 16  # times as many
WHOLE = 10**9  # a lane as long as its row
KEPT = 8  # chunks that a head that is trained may keep for the backward pass; of more each is made again


def chunk_of(vocabulary: int, *, cards: bool) -> int:
    """Positions whose logits are held at once: more on graphics cards, whose products are slow if they are small."""
    return max(1, CHUNK_LOGITS * (ON_CARDS if cards else 1) // vocabulary)


class _Handed(BaseModelOutputWithPast):
    """An output that answers None for whatever a particular head asks of its backbone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _HandThrough(nn.Module):
    """Stands where the backbone stood and gives back the hidden states it is given."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real  # not a child: parameters must not be counted twice

    def forward(
        self,
        *_: Any,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        **__: Any,
    ) -> _Handed:
        return _Handed(last_hidden_state=inputs_embeds if decoder_inputs_embeds is None else decoder_inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else getattr(self.__dict__["real"], name)


def head_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """(backbone, head): the head maps hidden states to final logits with every soft cap and scale the model has.

    It is a shallow twin of the whole model whose backbone hands its input through. `lm_head(hidden)` by hand is
    silently not the logits in Gemma-2, Cohere, Granite and others.
    """
    names = (model.base_model_prefix, "model", "transformer", "decoder")  # a T5 has its decoder beside its encoder
    name = next(n for n, child in model.named_children() if child is model.base_model or n in names)
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__.pop(
        "forward", None
    )  # put on the instance by others (accelerate, TRL), it would be bound to the original
    twin._modules = {**model._modules, name: _HandThrough(model._modules[name])}  # type: ignore[arg-type]
    for key, value in model.__dict__.items():  # hooks of its own, so that FSDP's do not run twice
        if key.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[key] = type(value)()
    return model._modules[name], twin  # type: ignore[return-value]


class _Scored(torch.autograd.Function):
    """Scores of tokens by a head that is not trained: no logits are kept, and none are made again.

    A token's score hears of its own hidden state alone, so its gradient is a row that the forward pass can lay by,
    whatever it will be multiplied by.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, score: Callable[..., torch.Tensor]) -> torch.Tensor:  # fmt: skip
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            found = score(states, targets)
            (slopes,) = torch.autograd.grad(found.sum(), states)
        ctx.save_for_backward(slopes)
        return found.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None


def _trained(model: PreTrainedModel) -> bool:
    """Whether anything of the head is trained: whatever is no part of the backbone."""
    backbone = set(map(id, head_of(model)[0].parameters()))
    if model.config.is_encoder_decoder:
        backbone |= set(map(id, model.get_encoder().parameters()))
    out = model.get_output_embeddings()  # may share its weights with the embeddings
    tied = out is not None and any(p.requires_grad for p in out.parameters())
    return tied or any(p.requires_grad for p in model.parameters() if id(p) not in backbone)


class Policy(nn.Module):
    """A causal language model that scores rows of trees.

    Args:
        hf: a transformers model, or a PEFT model around one.
        layout: `tree` (one pass over the row) or `padded` (each branch on its own line).

    `temperature` divides the logits: a policy that samples at another temperature than 1 is scored as it samples.
    """

    def __init__(self, hf: Any, layout: Layout = "tree") -> None:
        super().__init__()
        self.hf = hf
        self.layout: Layout = layout
        self.temperature = 1.0
        self.segments = False  # attention piece by piece: once it is proven
        self._halves = Halves()
        self._by_blocks = False  # whether the last tree pass was by FlexAttention
        self.train(hf.training)

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model within; its LoRA layers stay active."""
        return adapted.inner(self.hf)

    @property
    def apart(self) -> bool:
        """Whether an encoder reads prompts and a decoder writes answers."""
        return bool(self.inner.config.is_encoder_decoder)

    def lane(self, tokens: int) -> int:
        """Tokens of a lane of a row, `tokens` where trees share one. Where each answer has a line of its own, trees of like
        length should share a row: each then has a lane of its own, and they are sorted by length. An encoder–decoder's
        rows are laid out by itself, so trees of all lengths fill one."""
        if self.layout == "padded":
            return 1
        return WHOLE if self.apart else tokens

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, row: Row) -> torch.Tensor:
        """Log-probability of every scored token given its path, float32 [S], in the order of `row.tgt`."""
        hidden, logits = self._hidden(row)
        scored = len(row.tgt)
        # The head's matrix products, too, come in few shapes: see `trees.ROUND`.
        more = rounded(scored) - scored
        hidden = functional.pad(hidden, (0, 0, 0, more))
        targets = functional.pad(row.ids.index_select(0, row.tgt), (0, more))

        def score(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with own_products(self.inner, self._halves):  # here, for when a chunk is computed anew in the backward pass
                return -functional.cross_entropy(logits(h), t, reduction="none")

        pieces = list(zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True))
        if torch.is_grad_enabled() and hidden.requires_grad and not _trained(self.inner):
            return torch.cat([_Scored.apply(h, t, score) for h, t in pieces])[:scored]  # type: ignore[misc]
        if torch.is_grad_enabled() and len(pieces) > KEPT:
            return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in pieces])[:scored]  # type: ignore[misc]
        return torch.cat([score(h, t) for h, t in pieces])[:scored]

    @property
    def chunk(self) -> int:
        """Positions whose logits are held at once."""
        return chunk_of(self.inner.config.get_text_config().vocab_size, cards=self.device.type == "cuda")

    @torch.no_grad()
    def divergence(self, other: Policy, row: Row) -> torch.Tensor:
        """KL(this policy ‖ other) of the whole next-token distribution at every scored token, nats, float32 [S]."""
        (mine, my_logits), (theirs, their_logits) = self._hidden(row), other._hidden(row)
        out = []
        for h, g in zip(mine.split(self.chunk), theirs.split(self.chunk), strict=True):
            p, q = my_logits(h).log_softmax(-1), their_logits(g).log_softmax(-1)
            out.append((p.exp() * (p - q)).sum(-1))
        return torch.cat(out)

    def _hidden(self, row: Row) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Hidden states at `src` [S, width], and what makes float32 logits [n, V] of some of them."""
        model = self.inner
        backbone, head = head_of(model)

        def logits(h: torch.Tensor) -> torch.Tensor:
            given: dict[str, Any] = {"inputs_embeds": h[None]}
            if self.apart:
                given = {"decoder_inputs_embeds": h[None], "encoder_outputs": (h[None],)}
            found = head(**given, use_cache=False).logits.squeeze(0).float()
            return found if self.temperature == 1 else found / self.temperature

        if self.apart:
            with own_products(self.hf, self._halves), kept_less(self.hf):
                return seq2seq.states(self.hf, row, in_line=self.layout == "tree"), logits
        hidden = self._tree(model, backbone, row) if self.layout == "tree" else self._padded(backbone, row)
        return hidden, logits

    def _tree(self, model: PreTrainedModel, backbone: nn.Module, row: Row) -> torch.Tensor:
        carrier, virtual = self._carrier(row.ids.device), adapted.virtual(self.hf)
        self._by_blocks = carrier is flex.carrier
        if carrier is not None:
            row = segments.in_line(row)
        soft, past = adapted.soft(self.hf), adapted.past(self.hf, row.lanes)
        if soft is not None:
            row = rooted(row, virtual)
        mask = tree_mask(model, row, next(self.parameters()).dtype, carrier=carrier)
        more: dict[str, Any] = {}
        if past is not None:  # seen from everywhere, and before every position
            more, mask = {"past_key_values": past}, widened(mask, virtual)
        reading = segments.read_at(backbone, row.src, len(row.ids))
        with own_products(self.hf, self._halves), kept_less(self.hf), reading:
            out = backbone(
                **adapted.given(self.hf, row.ids.view(row.lanes, -1), soft),
                position_ids=row.pos.view(row.lanes, -1) + (virtual if past is not None else 0),
                attention_mask=mask,
                use_cache=False,
                **more,
            )
        # index_select, not indexing: the backward of the latter is not deterministic with two CPU threads
        return out.last_hidden_state.flatten(0, 1).index_select(0, row.src)

    def _carrier(self, device: torch.device) -> Carrier | None:
        """What attends piece by piece: segments on processors, FlexAttention on graphics cards; None: dense masks."""
        config = self.inner.config
        if not self.segments or config._attn_implementation != "sdpa" or adapted.virtual(self.hf):
            return None
        if device.type == "cpu":
            return segments.carrier
        return None if flex.refused(config, device, padded_precision(self)) else flex.carrier

    @property
    def attention(self) -> str:
        """What computed attention in the last pass, by transformers' name."""
        blocks = self.layout == "tree" and self._by_blocks
        return "flex_attention" if blocks else str(self.inner.config._attn_implementation)

    def _padded(self, backbone: nn.Module, row: Row) -> torch.Tensor:
        """The same numbers from separate right-padded sequences; a token that branches share is scored on the first."""
        virtual, soft = adapted.virtual(self.hf), adapted.soft(self.hf)
        first = 0 if soft is None else virtual
        lines, flat, width = _unrolled(row, first)
        ids = torch.zeros(len(lines), width, dtype=torch.long, device=row.ids.device)
        mask = torch.zeros(len(lines), virtual - first + width, dtype=torch.long, device=row.ids.device)
        for k, line in enumerate(lines):
            ids[k, first : first + len(line)] = row.ids[line]
            mask[k, : virtual + len(line)] = 1
        past = adapted.past(self.hf, len(lines))
        more: dict[str, Any] = {} if past is None else {"past_key_values": past}
        with own_products(self.hf, self._halves), kept_less(self.hf):
            out = backbone(**adapted.given(self.hf, ids, soft), attention_mask=mask, use_cache=False, **more)
        return out.last_hidden_state.flatten(0, 1).index_select(0, flat)


def _unrolled(row: Row, first: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Every branch of a row as a line of token indices, and where in the [lines × width] grid each `src` lies.

    `first`: places at the beginning of each line of the grid that are left free.
    """
    lines = [
        torch.from_numpy(tree.path(b)).to(row.ids.device) + start
        for tree, start in zip(row.trees, row.starts, strict=True)
        for b in range(len(tree.tips))
    ]
    width = first + max(len(line) for line in lines)
    depth = row.pos.index_select(0, row.src)
    return lines, row.branch * width + first + depth, width


def padded_precision(policy: Policy) -> torch.dtype:
    """The dtype that a forward pass of this policy computes in."""
    kind = policy.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(policy.parameters()).dtype
