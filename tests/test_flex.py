"""FlexAttention's rule and blocks on trees: what each layer sees, against dense masks; numbers against dense attention.

Compiled kernels need a graphics card (`test_cuda.py`); here PyTorch computes the same functions uncompiled, which it can
do forward only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from temper.models import flex, scores, segments
from temper.models.attention import Carrier, Mask, tree_mask
from temper.models.proof import prove
from temper.models.scores import Policy
from temper.trees import Node, Row, flatten, join, stack
from tiny_models import VOCABULARY, WINDOW, build

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@st.composite
def nodes(draw: Any, depth: int = 3) -> Node:
    ids = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=2 * WINDOW))
    children = draw(st.lists(nodes(depth - 1), max_size=3)) if depth else []
    return Node(ids, [1.0] * len(ids), tuple(children))


def rows() -> Any:
    lanes = st.lists(st.lists(nodes().map(flatten), min_size=1, max_size=3), min_size=1, max_size=3)
    return lanes.map(stack)


def by_hand(row: Row, window: int | None) -> torch.Tensor:
    """Bool [T, T] of a row in one line, out of the branches' paths alone: whoever lies before on the same path."""
    seen = torch.zeros(len(row.ids), len(row.ids), dtype=torch.bool)
    for tree, start in zip(row.trees, row.starts, strict=True):
        for b in range(len(tree.tips)):
            path = (torch.from_numpy(tree.path(b)) + start).tolist()
            for k, i in enumerate(path):
                for j in path[max(0, k + 1 - window) if window else 0 : k + 1]:
                    seen[i, j] = True
    used = sum(len(t) for t in row.trees)
    seen[range(used, len(row.ids)), range(used, len(row.ids))] = True
    return seen


def masks(model: Any, row: Row, carrier: Carrier | None) -> dict[str, torch.Tensor]:
    made: Mask = tree_mask(model, row, torch.float32, carrier=carrier)
    return made if isinstance(made, dict) else {"full_attention": made}


@given(rows())
@settings(max_examples=12, deadline=None)
def test_the_rule_is_that_of_the_dense_mask_and_of_the_paths(row: Row) -> None:
    line, model = segments.in_line(row), build("gemma3")
    n = len(line.ids)
    dense = masks(model, line, None)
    for kind, mask in masks(model, line, flex.carrier).items():
        assert mask.shape == (1, 1, n, n) and mask.untyped_storage().nbytes() == 1
        made = create_mask(mask.blocks.mask_mod, 1, 1, n, n, device="cpu")  # type: ignore[attr-defined]
        assert torch.equal(made, dense[kind])
        assert torch.equal(made[0, 0], by_hand(line, WINDOW if kind == "sliding_attention" else None))


def test_blocks_that_nobody_sees_are_left_out() -> None:
    """Two trees of 256 tokens, prompt of 128 and two answers of 64: 3 blocks each of 16; a window leaves out none."""
    tree = flatten(Node([5] * 128, None, (Node([6] * 64), Node([7] * 64))))
    [mask] = masks(build("llama"), join([tree, tree]), flex.carrier).values()
    assert mask.blocks.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("heads,shared", [(4, 4), (6, 2)])
def test_attention_equals_dense_attention_in_float64(heads: int, shared: int) -> None:
    assert flex.difference(300, heads, shared, 16, torch.device("cpu"), torch.float64, backward=False) < 1e-12


def test_a_rule_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's comparison can fail: blocks of the causal rule alone, branches seeing one another."""
    right = flex.carrier

    def causal(row: Row, own_rule: flex.Rule) -> torch.Tensor:
        return right(dataclasses.replace(row, end=torch.full_like(row.end, len(row.ids))), own_rule)

    monkeypatch.setattr(flex, "carrier", causal)
    assert flex.difference(150, 2, 2, 16, torch.device("cpu"), torch.float64, backward=False) > 0.1


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Policies take blocks where they take segments on processors."""
    monkeypatch.setattr(scores.segments, "carrier", flex.carrier)
    yield


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_a_model_scores_by_blocks_as_by_dense_masks(family: str, by_blocks: None) -> None:
    """Forward only: PyTorch has no backward pass of it on processors. Lanes of unequal trees become one line."""
    draw = torch.Generator().manual_seed(1)

    def node(n: int, *children: Node) -> Node:
        return Node(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist(), [1.0] * n, children)

    row = stack([[flatten(node(90, node(40), node(30))), flatten(node(11, node(5)))], [flatten(node(70, node(9)))]])
    policy = Policy(build(family)).eval()
    expected = policy(row)
    policy.segments = True
    assert (policy(row) - expected).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = policy(row)
        policy.segments = False
        assert (half - policy(row)).abs().mean() < 0.05
    assert prove(policy)["layout"] == "tree" and policy.segments, "the proof takes blocks"


def test_blocks_of_another_model_fail_the_proof(by_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window forgotten in the blocks: the proof on the model goes on to dense masks."""
    right = flex.carrier
    monkeypatch.setattr(scores.segments, "carrier", lambda row, own: right(row, lambda *a: a[2] >= a[3]))
    policy = Policy(build("gemma3"))
    assert prove(policy)["layout"] == "tree" and not policy.segments


def test_processors_are_refused_and_facts_say_so() -> None:
    model = build("llama")
    assert flex.refused(model.config, torch.device("cpu"), torch.float32) == "no kernels are compiled for cpu"
    policy = Policy(model)
    prove(policy)
    assert policy.attention == "sdpa"
