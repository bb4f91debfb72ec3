"""Which sampler a model gets: found out on the model itself, since a wrong one writes fluent nonsense without an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from temper.models import adapted
from temper.models.attention import refuses_trees, smallest_window
from temper.models.scores import Policy, padded_precision
from temper.rollouts import fallback, native
from temper.rollouts.decoding import Decoding, Draft
from temper.rollouts.distribution import uniforms
from temper.rollouts.memory import NotNative
from temper.trees import group, join

Layout = Literal["native", "generate"]

STEPS = 6  # tokens of each probe completion
AFFORDABLE = 1024  # a window up to this many tokens is outrun by the probe
FAILURES = (ValueError, RuntimeError, AttributeError, KeyError, TypeError, IndexError, NotNative)


@torch.no_grad()
def prove(policy: Policy) -> tuple[Layout, str]:
    """(layout, why): the native sampler where what it samples has the log-probabilities that the plain model gives it.

    Three random prompts, one of them longer than the smallest window, two completions each in fewer slots than
    completions, so that rows leave and enter. As a control the completions are scored behind one another's prompts:
    agreement must be close against how much a wrong context changes.
    """
    model = policy.inner
    config = model.config.get_text_config()
    if why := refuses_trees(model):
        return "generate", why
    if n := adapted.virtual(policy.hf):
        return "generate", f"{n} virtual tokens stand before every prompt"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        return "generate", f"{rope} positions change with the longest of a batch"
    window = smallest_window(model) or 0
    first = min(
        window + 4 if window <= AFFORDABLE else 12, (getattr(config, "max_position_embeddings", None) or 64) - 8
    )
    prompts = _prompts((max(12, first), 9, 5), config.vocab_size)
    policy.layout = "padded"
    try:
        drafts = _decoded(native.decode, model, [p for p in prompts for _ in range(2)], slots=4)
        got = torch.from_numpy(np.concatenate([d.done.raw for d in drafts if d.done is not None]))
        written = [[d.ids for d in drafts[i : i + 2]] for i in range(0, len(drafts), 2)]
        expected, control = (
            policy(join([group(p, w) for p, w in zip(contexts, written, strict=True)]).to(policy.device)).cpu()
            for contexts in (prompts, prompts[1:] + prompts[:1])
        )
    except FAILURES as error:
        return "generate", str(error).splitlines()[0] if str(error) else type(error).__name__
    full = padded_precision(policy) == torch.float32
    difference, visible = (_size(x - expected, len(prompts), full) for x in (got, control))
    if visible > 0 and difference <= (0.002 if full else 0.2) * visible:
        return "native", f"equal to the plain model to {difference:.1e} nats (another prompt changes {visible:.1e})"
    return "generate", f"the native sampler differs from the plain model by {difference:.1e} nats"


def _size(change: torch.Tensor, prompts: int, full: bool) -> float:
    """The largest change; in half precision the largest of the prompts' medians, for rounding alone sends a token of a
    mixture of experts another way now and then."""
    by_prompt = change.abs().view(prompts, -1)
    return float((by_prompt if full else by_prompt.median(1).values).max())


@torch.no_grad()
def trusted(policy: Policy) -> tuple[fallback.Together, str]:
    """Which prompts `generate` may decode in one batch: the most that gives what the model gives each alone.

    Padding on the left is not invisible to every model, and a few lose their state in any batch. The text is empty,
    or says that not even single prompts agree.
    """
    full = padded_precision(policy) == torch.float32
    policy.layout = "padded"
    prompts = _prompts((11, 5, 5), policy.inner.config.get_text_config().vocab_size)
    change = 0.0
    kinds: tuple[fallback.Together, ...] = ("any length", "equal length", "none")
    for together in kinds:
        drafts = _decoded(fallback.decode, policy.hf, prompts, pad_id=0, slots=3, together=together)
        differences = []
        for prompt, draft in zip(prompts, drafts, strict=True):
            assert draft.done is not None
            alone = policy(join([group(prompt, [draft.ids])]).to(policy.device)).cpu()
            differences.append(torch.from_numpy(draft.done.raw) - alone)
        change = _size(torch.cat(differences), len(prompts), full)
        if change < (1e-3 if full else 0.3):
            return together, ""
    return "none", f"; what it decodes differs from what the model scores by {change:.1e} nats"


def _prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def _decoded(decode: Any, model: Any, prompts: list[list[int]], **options: Any) -> list[Draft]:
    decoding = Decoding(max_new_tokens=STEPS, temperature=1)
    drafts = [Draft(decoding, frozenset(), None, uniforms(STEPS, k)) for k in range(len(prompts))]
    decode(model, prompts, drafts, **options)
    return drafts
