"""Trees against a reference that knows only parents: every array of a tree says what recursion over its nodes says."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.trees import Node, Row, Tree, chain, flatten, group, join, pack, rows_of, split, stack

Token = tuple[int, int | None, float]  # id, index of its parent, weight


def runs(least: int) -> st.SearchStrategy[Node]:
    """A node without children: up to five tokens, most of them with weights."""
    token = st.tuples(st.integers(0, 30), st.sampled_from([0.0, 1.0, 0.5, -2.0]))
    made = st.lists(token, min_size=least, max_size=5)
    weighed = made.map(lambda pairs: Node([i for i, _ in pairs], [w for _, w in pairs]))
    return weighed | made.map(lambda pairs: Node([i for i, _ in pairs]))


def grown(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.builds(
        lambda node, children: Node(node.ids, node.weights, tuple(children)), runs(1), st.lists(inner, max_size=3)
    )


NODES = st.recursive(runs(1), grown, max_leaves=8)


def by_recursion(root: Node) -> tuple[list[Token], list[int]]:
    """Every token with its parent, depth first, and the last token of each root-to-leaf path."""
    tokens: list[Token] = []
    tips: list[int] = []

    def walk(node: Node, parent: int | None) -> None:
        for k, token in enumerate(node.ids):
            tokens.append((token, parent, 0.0 if node.weights is None else node.weights[k]))
            parent = len(tokens) - 1
        for child in node.children:
            walk(child, parent)
        if not node.children:
            assert parent is not None
            tips.append(parent)

    walk(root, None)
    return tokens, tips


def line(tokens: list[Token], index: int) -> list[int]:
    """Indices from the root to a token, by following parents."""
    parent = tokens[index][1]
    return [*([] if parent is None else line(tokens, parent)), index]


def sees(end: np.ndarray) -> np.ndarray:
    i = np.arange(len(end))
    return (i[None, :] <= i[:, None]) & (i[:, None] < end[None, :])


def scored(tree: Tree) -> Counter:
    """What a tree teaches: (the ids before and up to a token, its weight), each as often as it stands there."""
    out: Counter = Counter()
    for tgt, src, weight, branch in zip(tree.tgt, tree.src, tree.weight, tree.branch, strict=True):
        path = tree.path(int(branch)).tolist()
        at = path.index(int(tgt))
        assert path[at - 1] == src
        out[tuple(int(i) for i in tree.ids[path[: at + 1]]), float(weight)] += 1
    return out


@settings(deadline=None)
@given(NODES)
def test_flatten_against_recursion(root: Node) -> None:
    tree = flatten(root, "here")
    tokens, tips = by_recursion(root)
    lines = [line(tokens, i) for i in range(len(tokens))]
    assert tree.ids.tolist() == [t[0] for t in tokens] and len(tree) == len(tokens)
    assert tree.pos.tolist() == [len(path) - 1 for path in lines]
    assert tree.depth == max(map(len, lines))
    visible = np.zeros((len(tokens), len(tokens)), bool)
    for i, path in enumerate(lines):
        visible[i, path] = True
    assert np.array_equal(sees(tree.end), visible)
    expected = [(i, parent, w) for i, (_, parent, w) in enumerate(tokens) if w and parent is not None]
    assert list(zip(tree.tgt.tolist(), tree.src.tolist(), tree.weight.tolist(), strict=True)) == expected
    assert tree.tips.tolist() == tips and tree.origin == "here"
    assert [tree.path(b).tolist() for b in range(len(tips))] == [lines[tip] for tip in tips]
    first = [next(b for b, tip in enumerate(tips) if i in lines[tip]) for i, _, _ in expected]
    assert tree.branch.tolist() == first


def test_dtypes_are_those_named() -> None:
    for tree in (flatten(Node([1, 2], [1, 1])), chain([1, 2, 3], [0, 1, 1]), flatten(Node([1, 2]))):
        arrays = (tree.ids, tree.pos, tree.end, tree.tgt, tree.src, tree.branch, tree.tips)
        assert {a.dtype for a in arrays} == {np.dtype("int32")} and tree.weight.dtype == np.float32


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 1.0, 0.25])), min_size=1, max_size=12))
def test_chain_is_a_tree_of_one_run(tokens: list[tuple[int, float]]) -> None:
    ids, weights = [i for i, _ in tokens], [w for _, w in tokens]
    one, other = chain(ids, weights, "x"), flatten(Node(ids, weights), "x")
    for name in ("ids", "pos", "end", "tgt", "src", "weight", "branch", "tips", "origin"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_group_by_hand() -> None:
    tree = group([9, 8], [[1, 2], [3]])
    assert tree.ids.tolist() == [9, 8, 1, 2, 3] and tree.pos.tolist() == [0, 1, 2, 3, 2]
    assert tree.end.tolist() == [5, 5, 4, 4, 5]
    # both first tokens of the branches are predicted from the prompt's last
    assert tree.src.tolist() == [1, 2, 1] and tree.tgt.tolist() == [2, 3, 4] and tree.weight.tolist() == [1, 1, 1]
    assert tree.branch.tolist() == [0, 0, 1] and tree.tips.tolist() == [3, 4]


def test_an_empty_branch_ends_where_its_parent_does() -> None:
    tree = flatten(Node([5, 6], None, (Node([]), Node([7], [1.0]))))
    assert tree.tips.tolist() == [1, 2] and tree.path(0).tolist() == [0, 1] and tree.path(1).tolist() == [0, 1, 2]


def check_row(row: Row, trees: list[Tree], lanes: int) -> None:
    """A row is its trees moved: no token sees another tree's, unused places see themselves alone."""
    width = len(row.ids) // lanes
    assert row.lanes == lanes and len(row.ids) == width * lanes
    assert row.tokens == sum(len(t) for t in trees)
    used = np.zeros(len(row.ids), bool)
    visible = sees(row.end.numpy())
    at_tgt = at_branch = 0
    for tree, start in zip(row.trees, row.starts, strict=True):
        own = slice(start, start + len(tree))
        assert start // width == (start + len(tree) - 1) // width, "a tree lies within one lane"
        assert not used[own].any()
        used[own] = True
        assert row.ids[own].tolist() == tree.ids.tolist() and row.pos[own].tolist() == tree.pos.tolist()
        assert np.array_equal(visible[own, own], sees(tree.end))
        assert visible[own].sum() == sees(tree.end).sum(), "sees its own tree only"
        mine = slice(at_tgt, at_tgt + len(tree.tgt))
        assert (row.tgt[mine] - start).tolist() == tree.tgt.tolist()
        assert (row.src[mine] - start).tolist() == tree.src.tolist()
        assert row.weight[mine].tolist() == tree.weight.tolist()
        assert (row.branch[mine] - at_branch).tolist() == tree.branch.tolist()
        tips = row.tips[at_branch : at_branch + len(tree.tips)]
        assert (tips - start).tolist() == tree.tips.tolist()
        at_tgt, at_branch = at_tgt + len(tree.tgt), at_branch + len(tree.tips)
    assert (len(row.tgt), len(row.tips)) == (at_tgt, at_branch)
    assert np.array_equal(visible[~used], np.eye(len(used), dtype=bool)[~used])
    assert not row.ids[torch.from_numpy(~used)].any()
    whole = (row.ids, row.pos, row.end, row.tgt, row.src, row.branch, row.tips)
    assert {t.dtype for t in whole} == {torch.int64} and row.weight.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(st.lists(NODES.map(flatten), min_size=1, max_size=4))
def test_join_puts_trees_side_by_side(trees: list[Tree]) -> None:
    row = join(trees)
    assert len(row.ids) == sum(map(len, trees)) and row.trees == tuple(trees)
    check_row(row, trees, 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(NODES.map(flatten), min_size=1, max_size=3), min_size=1, max_size=4))
def test_stack_gives_lanes_of_equal_width(lanes: list[list[Tree]]) -> None:
    row = stack(lanes)
    assert len(row.ids) == len(lanes) * max(sum(map(len, lane)) for lane in lanes)
    check_row(row, [t for lane in lanes for t in lane], len(lanes))


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50))
def test_pack_keeps_every_index_within_the_budget(sizes: list[int], budget: int) -> None:
    rows = pack(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in row) for row in rows]
    assert all(total <= budget or len(row) == 1 for row, total in zip(rows, totals, strict=True))
    # First fit: two rows that fit into one would have been one.
    fitting = sorted(t for t in totals if t <= budget)
    assert all(a + b > budget for a, b in pairwise(fitting))


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 10))
def test_pack_is_first_fit(sizes: list[int], budget: int) -> None:
    rows: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = (r for r in rows if sum(sizes[k] for k in r) + sizes[i] <= max(budget, sum(sizes[k] for k in r)))
        if (row := next(fits, None)) is None:
            rows.append(row := [])
        row.append(i)
    assert pack(sizes, budget) == rows


@settings(deadline=None, max_examples=40)
@given(st.lists(NODES.map(flatten), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 120))
def test_rows_hold_every_tree_once(trees: list[Tree], row_tokens: int, micro_tokens: int) -> None:
    rows = rows_of(trees, row_tokens, micro_tokens)
    assert sorted(id(t) for row in rows for t in row.trees) == sorted(map(id, trees))
    for row in rows:
        check_row(row, list(row.trees), row.lanes)
        width = len(row.ids) // row.lanes
        assert width <= max(row_tokens, *map(len, row.trees))
        lanes = [0] * row.lanes
        for tree, start in zip(row.trees, row.starts, strict=True):
            lanes[start // width] += len(tree)
        assert width in (max(lanes), min(row_tokens, micro_tokens)) or width % 64 == 0, "few shapes"
        assert len(row.ids) <= micro_tokens or row.lanes == 1


@settings(deadline=None)
@given(NODES.map(flatten), st.integers(1, 40))
def test_split_loses_and_repeats_nothing_scored(tree: Tree, budget: int) -> None:
    parts = split(tree, budget)
    assert sum((scored(p) for p in parts), Counter()) == scored(tree)
    found = [p.ids[p.path(b)].tolist() for p in parts for b in range(len(p.tips))]
    assert found == [tree.ids[tree.path(b)].tolist() for b in range(len(tree.tips))]
    for part in parts:
        assert part.origin == tree.origin
        assert len(part) <= budget or len(part.tips) == 1, "longer only where a single path is"
        assert len(part.ids) == len(np.unique(np.concatenate([part.path(b) for b in range(len(part.tips))])))
        seen = sees(part.end)
        for b, tip in enumerate(part.tips):
            assert np.flatnonzero(seen[tip]).tolist() == part.path(b).tolist()
        assert (seen.sum(1) == part.pos + 1).all(), "what a token sees is its path, and pos its depth"
    if len(tree) <= budget:
        assert len(parts) == 1


def test_splitting_joins_what_fits() -> None:
    tree = group(list(range(10)), [[1] * 3 for _ in range(6)])  # 28 tokens; two branches and the prompt take 16
    assert [len(p) for p in split(tree, 16)] == [16, 16, 16]
    assert [len(p) for p in split(tree, 12)] == [13] * 6


def test_a_row_moves_whole() -> None:
    row = join([group([1, 2], [[3], [4]])])
    moved = row.to(torch.device("meta"))
    assert all(getattr(moved, n).device.type == "meta" for n in ("ids", "pos", "end", "tgt", "src", "weight", "tips"))
    assert moved.trees is row.trees and moved.lanes == row.lanes


@pytest.mark.parametrize("weights", [[0.0, 0.0], [3.0, 0.0]])
def test_a_first_token_is_never_scored(weights: list[float]) -> None:
    assert len(chain([4, 5], weights).tgt) == 0 and len(flatten(Node([4, 5], weights)).tgt) == 0
