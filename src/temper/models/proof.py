"""The proof of the layout: the tree pass against the padded pass on the very model that will be trained or asked."""

from __future__ import annotations

from typing import Any

import torch

from temper.errors import ModelError
from temper.models import seq2seq
from temper.models.attention import refuses_trees, smallest_window
from temper.models.scores import Policy, padded_precision
from temper.trees import Node, Row, chain, flatten, group, join


def prove(policy: Policy, *, length: int = 64, seed: int = 0) -> dict[str, Any]:
    """Compare the tree pass with the padded pass on this very model, and choose the layout by it.

    The probe has two trees of two branches each, paths longer than the smallest window where `length` (the longest
    example to come, in tokens) reaches that far. A control with an ordinary causal mask must differ visibly, so
    that agreement means something.

    Returns:
        {"layout", "reason", "difference", "control"}: log-probabilities' largest differences in nats.
    """
    model = policy.inner
    if model.config.is_encoder_decoder:
        return _prove_lines(policy, seed)
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


@torch.no_grad()
def _prove_lines(policy: Policy, seed: int) -> dict[str, Any]:
    """`prove` for an encoder–decoder: what it gives each answer alone, without padding, against all answers of a prompt in
    one line («tree») and each in its own («padded»). As a control the answers are scored on one another's prompts.

    Raises:
        ModelError: neither agrees.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, difference, visible = policy.inner.config.get_text_config().vocab_size, 0.0, 0.0

    def draw(n: int) -> list[int]:
        return torch.randint(2, vocabulary, (n,), generator=generator).tolist()

    prompts, answers = [draw(13), draw(6)], [[draw(9), draw(5)], [draw(4), draw(12)]]
    row = join([group(p, some) for p, some in zip(prompts, answers, strict=True)]).to(policy.device)
    was_training = policy.training
    policy.eval()
    try:
        wanted, control = (
            torch.cat([seq2seq.alone(policy.hf, p, a) for p, some in zip(of, answers, strict=True) for a in some])
            for of in (prompts, prompts[::-1])
        )
        visible = (control - wanted).abs().max().item()
        for layout, reason in (
            ("tree", "answers to one prompt in one line equal each alone"),
            ("padded", "answers in lines of their own equal each alone"),
        ):
            policy.layout = layout  # type: ignore[assignment]
            difference = (policy(row) - wanted).abs().max().item()
            if visible > 0 and difference <= _tolerated(policy) * visible:
                return {"layout": layout, "reason": reason, "difference": difference, "control": visible}
    finally:
        policy.train(was_training)
    raise ModelError(
        f"{policy.inner.config.model_type}: answers scored in batches differ from answers scored alone by up to "
        f"{difference:.2g} nats (another prompt changes {visible:.2g})",
        do="choose another encoder–decoder, such as a T5 or a BART",
    )


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
