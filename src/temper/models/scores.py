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

from temper.errors import ModelError
from temper.models import flex, segments
from temper.models.attention import Carrier, refuses_trees, smallest_window, tree_mask
from temper.models.products import Halves, own_products
from temper.trees import Node, Row, chain, flatten, join, rounded

Layout = Literal["tree", "padded"]
CHUNK_LOGITS = 8 * 2**20  # logits made at once, by default 8 M: 32 MiB in float32, whatever the vocabulary
ON_CARDS = 16  # times as many
KEPT = 8  # chunks that a head that is trained may keep for the backward pass; of more each is made again


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

    def forward(self, *_: Any, inputs_embeds: torch.Tensor | None = None, **__: Any) -> _Handed:
        return _Handed(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else getattr(self.__dict__["real"], name)


def head_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """(backbone, head): the head maps hidden states to final logits with every soft cap and scale the model has.

    It is a shallow twin of the whole model whose backbone hands its input through. `lm_head(hidden)` by hand is
    silently not the logits in Gemma-2, Cohere, Granite and others.
    """
    names = (model.base_model_prefix, "model", "transformer")
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
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

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
        """Positions whose logits are held at once: more on graphics cards, whose products are slow if they are small."""
        held = CHUNK_LOGITS * (ON_CARDS if self.device.type == "cuda" else 1)
        return max(1, held // self.inner.config.get_text_config().vocab_size)

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
            found = head(inputs_embeds=h[None], use_cache=False).logits.squeeze(0).float()
            return found if self.temperature == 1 else found / self.temperature

        hidden = self._tree(model, backbone, row) if self.layout == "tree" else self._padded(backbone, row)
        return hidden, logits

    def _tree(self, model: PreTrainedModel, backbone: nn.Module, row: Row) -> torch.Tensor:
        carrier = self._carrier(row.ids.device)
        self._by_blocks = carrier is flex.carrier
        if carrier is not None:
            row = segments.in_line(row)
        with own_products(self.hf, self._halves), segments.read_at(backbone, row.src, len(row.ids)):
            out = backbone(
                input_ids=row.ids.view(row.lanes, -1),
                position_ids=row.pos.view(row.lanes, -1),
                attention_mask=tree_mask(model, row, next(self.parameters()).dtype, carrier=carrier),
                use_cache=False,
            )
        # index_select, not indexing: the backward of the latter is not deterministic with two CPU threads
        return out.last_hidden_state.flatten(0, 1).index_select(0, row.src)

    def _carrier(self, device: torch.device) -> Carrier | None:
        """What attends piece by piece: segments on processors, FlexAttention on graphics cards; None: dense masks."""
        config = self.inner.config
        if not self.segments or config._attn_implementation != "sdpa":
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
        lines, flat, width = _unrolled(row)
        ids = torch.zeros(len(lines), width, dtype=torch.long, device=row.ids.device)
        mask = torch.zeros_like(ids)
        for k, line in enumerate(lines):
            ids[k, : len(line)] = row.ids[line]
            mask[k, : len(line)] = 1
        with own_products(self.hf, self._halves):
            out = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, flat)


def _unrolled(row: Row) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Every branch of a row as a line of token indices, and where in the [lines × width] grid each `src` lies."""
    lines = [
        torch.from_numpy(tree.path(b)).to(row.ids.device) + start
        for tree, start in zip(row.trees, row.starts, strict=True)
        for b in range(len(tree.tips))
    ]
    width = max(len(line) for line in lines)
    depth = row.pos.index_select(0, row.src)
    return lines, row.branch * width + depth, width


def prove(policy: Policy, *, length: int = 64, seed: int = 0) -> dict[str, Any]:
    """Compare the tree pass with the padded pass on this very model, and choose the layout by it.

    The probe has two trees of two branches each, paths longer than the smallest window where `length` (the longest
    example to come, in tokens) reaches that far. A control with an ordinary causal mask must differ visibly, so
    that agreement means something.

    Returns:
        {"layout", "reason", "difference", "control"}: log-probabilities' largest differences in nats.
    """
    model = policy.inner
    why = refuses_trees(model)
    if why:
        policy.layout = "padded"
        return {"layout": "padded", "reason": why, "difference": None, "control": None}
    window = smallest_window(model) or 0
    prompt = max(12, min(length - 8, window + 4)) if window and window <= 8192 else 12
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(0, vocabulary, (n,), generator=generator).tolist()

    def tree(n: int) -> Any:
        return flatten(Node(draw(n), None, tuple(Node(draw(k), [1.0] * k) for k in (7, 5))))

    row = join([tree(prompt), tree(9)]).to(policy.device)
    causal = Row(
        **{
            **row.__dict__,
            "end": torch.full_like(row.end, len(row.ids)),
            "pos": torch.arange(len(row.ids), device=row.pos.device),
        }
    )
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            policy.layout, why = "padded", ""
            padded = policy(row)
            policy.layout = "tree"
            for policy.segments in (True, False):  # where a model rebuilds its mask the segments are lost
                try:
                    got, control = policy(row), policy(causal)
                except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
                    why = f"the tree pass failed: {error}"
                    continue
                difference, visible = (got - padded).abs().max().item(), (control - padded).abs().max().item()
                if visible > 0 and difference <= _tolerated(policy) * visible:
                    reason = "the tree pass equals the padded pass"
                    return {"layout": "tree", "reason": reason, "difference": difference, "control": visible}
                why = ""
    finally:
        policy.train(was_training)
    policy.layout = "padded"
    if why:
        return {"layout": "padded", "reason": why, "difference": None, "control": None}
    reason = "the tree pass differs from the padded pass"
    return {"layout": "padded", "reason": reason, "difference": difference, "control": visible}


def check_causal(policy: Policy, *, seed: int = 0) -> None:
    """Make sure that no token's score hears of later tokens: a model that looks ahead learns to copy them.

    Two sequences that differ in one late token must score everything before it alike. transformers loads encoders
    such as BERT as causal models without objecting.

    Raises:
        ModelError: a score changed.
    """
    vocabulary = policy.inner.config.get_text_config().vocab_size
    one = torch.randint(0, vocabulary, (14,), generator=torch.Generator().manual_seed(seed))
    other = one.clone()
    other[11] = (one[11] + vocabulary // 2) % vocabulary
    row = join([chain(ids.tolist(), [1.0] * len(ids)) for ids in (one, other)]).to(policy.device)
    was_training, layout = policy.training, policy.layout
    policy.eval()
    policy.layout = "padded"
    try:
        with torch.no_grad():
            first, second = policy(row).split(len(one) - 1)
    finally:
        policy.train(was_training)
        policy.layout = layout
    change = (first - second).abs()  # [13]: scores of tokens 1 to 13
    before, after = change[:10].max().item(), change[11:].max().item()
    if before > _tolerated(policy) * after:
        raise ModelError(
            f"{policy.inner.config.model_type} sees the tokens that it is to predict (a score changed by {before:.2g} "
            "nats when only a later token did)",
            do="choose a causal language model; an encoder such as BERT is none",
        )


def _tolerated(policy: Policy) -> float:
    """Rounding, as a share of what a real error would change. Half precision rounds two padded batches differently."""
    return 0.02 if padded_precision(policy) == torch.float32 else 0.2


def padded_precision(policy: Policy) -> torch.dtype:
    """The dtype that a forward pass of this policy computes in."""
    kind = policy.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(policy.parameters()).dtype
