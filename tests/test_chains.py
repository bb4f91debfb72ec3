"""Sequences kept in a few arrays are the trees that they were."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.engine.batches import Batches
from temper.engine.chains import Chains, scored, sizes
from temper.trees import Tree, chain

SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9
)


def same(a: Tree, b: Tree) -> bool:
    return (a.origin, a.root) == (b.origin, b.root) and all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) and getattr(a, f.name).dtype == getattr(b, f.name).dtype
        for f in dataclasses.fields(Tree)
        if f.name not in ("origin", "root", "extra")
    )


@given(SEQUENCES, st.integers(1, 9))
def test_against_trees_made_at_once(drawn: list[list[tuple[int, bool]]], limit: int) -> None:
    some = [([i for i, _ in one], [t for _, t in one], f"a:{k}") for k, one in enumerate(drawn)]
    chains, trees = Chains(some), [chain(ids, [float(m) for m in marks], where) for ids, marks, where in some]
    assert len(chains) == len(trees) and all(map(same, chains, trees)) and same(chains[-1], trees[-1])
    assert all(map(same, chains[1:], trees[1:]))
    assert chains.sizes.tolist() == sizes(trees).tolist() == [len(t) for t in trees]
    assert scored(chains) == scored(trees) and chains.trained.tolist() == [len(t.tgt) for t in trees]
    kept = [t for t in trees if len(t) <= limit]
    assert all(map(same, chains.within(limit), kept)) and len(chains.within(limit)) == len(kept)
    more = [chain(i[:limit], m[:limit], w) for i, m, w in some if len(i) > limit and any(m[:limit])]
    both = chains.within(limit, cut=True)
    assert len(both) == len(kept + more) and all(map(same, both, kept + more))


def test_beyond_the_end_there_is_none() -> None:
    with pytest.raises(IndexError):
        Chains([([1], [True], "")])[1]


def test_tokens_of_steps() -> None:
    """Two epochs and one step more, counted one by one."""
    trees = [chain([1] * n, [1.0] * n) for n in (3, 1, 4, 1, 5)]
    batches = Batches(trees, 2, 64, 64, 0)
    assert batches.tokens(7) == sum(sum(len(trees[i]) for i in batches.chosen(k)) for k in range(7))
    assert Batches(Chains(([1] * len(t), [True] * len(t), "") for t in trees), 2, 64, 64, 0).tokens(
        7
    ) == batches.tokens(7)
