"""Encoder–decoders in trees: the log-probabilities and gradients that the model gives each answer alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from temper.models import seq2seq
from temper.models.proof import check_causal, prove
from temper.models.scores import Policy
from temper.trees import Node, chain, flatten, group, join, rows_of
from tiny_models import LINES, VOCABULARY, build

RELATIVE = {"t5", "t5 gated", "umt5", "mt5"}  # their decoders count distances


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# prompts of several lengths with one, two and three answers, of one of which half is scored
PROMPTS = [draw(11, 1), draw(4, 2), draw(7, 3)]
ANSWERS = [[draw(6, 4), draw(9, 5)], [draw(5, 6)], [draw(3, 7), draw(8, 8), draw(4, 9)]]


def trees() -> list[Any]:
    return [group(p, some, f"row {k}") for k, (p, some) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]


def theirs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """By transformers' own call with labels, nothing of ours: log-probabilities of one answer."""
    out = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer]))
    return out.logits[0].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", LINES)
def test_log_probabilities_and_gradients_are_the_models_own(family: str, attention: str) -> None:
    model: Any = build(family, attention=attention)
    policy = Policy(model)
    proof = prove(policy)
    assert proof["layout"] == ("tree" if family in RELATIVE else "padded") and proof["control"] > 0.3
    check_causal(policy)
    layouts: list[Any] = ["tree", "padded"] if family in RELATIVE else ["padded"]
    exact = copy.deepcopy(model).double()
    wanted = gradients(exact, apart(exact))
    for layout in layouts:
        policy.layout = layout
        got = policy(join(trees()))
        assert torch.allclose(got, apart(model), atol=1e-4), (got - apart(model)).abs().max()
        # These random models magnify rounding: transformers' own float32 gradients are off by up to 5e-5.
        check(gradients(model, got), wanted, 1e-3)
        twin = Policy(exact)
        twin.layout = layout
        check(gradients(exact, twin(join(trees()))), wanted, 1e-6)  # attention keeps its softmax in float32


def apart(model: Any) -> torch.Tensor:
    """Log-probabilities of each answer by transformers alone."""
    return torch.cat([theirs(model, p, a) for p, some in zip(PROMPTS, ANSWERS, strict=True) for a in some])


def gradients(model: Any, logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weights = torch.linspace(0.5, 1.5, len(logps)).to(logps.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((logps * weights).sum(), trained, allow_unused=True)


def check(found: tuple[torch.Tensor | None, ...], wanted: tuple[torch.Tensor | None, ...], within: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        # the bias of keys has no gradient but rounding
        assert a is None or b is None or (a - b).norm() <= within * b.norm() + 1e-5


def test_rows_cut_as_the_loop_cuts_them_give_the_same() -> None:
    """Each tree has a lane of its own where rows are one token wide: trees of like length share a row."""
    policy = Policy(build("t5"))
    whole = policy(join(trees()))
    parts = rows_of(trees(), 1, 40)
    assert len(parts) > 1
    scores = {tree.origin: some for row in parts for tree, some in zip(row.trees, policy(row).split([len(t.tgt) for t in row.trees]), strict=True)}  # fmt: skip
    got = torch.cat([scores[f"row {k}"] for k in range(3)])
    assert torch.allclose(got, whole, atol=1e-5)


def test_a_chain_is_cut_where_scoring_begins() -> None:
    """The root of a chain, which the encoder reads, is what stands before the first scored token."""
    policy = Policy(build("t5"))
    prompt, answer = PROMPTS[0], ANSWERS[0][0]
    tree = chain([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))
    assert tree.root == len(prompt)
    assert torch.allclose(policy(join([tree])), theirs(policy.hf, prompt, answer), atol=1e-4)


def test_branches_of_branches_are_lines_of_their_own() -> None:
    """Two answers that begin alike, as a tree within the tree: what they share is scored once."""
    policy = Policy(build("t5"))
    shared, one, two = draw(3, 20), draw(4, 21), draw(2, 22)
    deep = flatten(Node(PROMPTS[0], None, (Node(shared, [1.0] * 3, (Node(one, [1.0] * 4), Node(two, [1.0] * 2))),)))
    first, second = theirs(policy.hf, PROMPTS[0], shared + one), theirs(policy.hf, PROMPTS[0], shared + two)
    for policy.layout in ("tree", "padded"):
        assert torch.allclose(policy(join([deep])), torch.cat([first, second[3:]]), atol=1e-4)


def test_the_encoder_runs_once_a_prompt() -> None:
    policy, seen = Policy(build("t5")), []
    policy.hf.get_encoder().register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state.shape[:2]))
    policy(join([group(PROMPTS[0], [draw(5, k) for k in range(8)])]))
    assert seen == [(1, 16)]


def test_a_model_that_hears_of_other_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that is seen changes scores: staged by telling the encoder of none."""
    real = seq2seq._laid

    def deaf(*given: Any) -> Any:
        ids, owners, begins = real(*given)
        return ids, np.where(owners < 0, owners.max(), owners), begins

    monkeypatch.setattr(seq2seq, "_laid", deaf)
    with pytest.raises(seq2seq.ModelError, match="differ from answers scored alone"):
        prove(Policy(build("t5")))
