"""Examples → trees → rows: each token stands once, and one rule says what it sees.

Written depth first, with `pos` the position along a token's own path and `end` one past the last token of its subtree,

    token i sees token j   ⇔   j ≤ i < end[j]

A conversation is a chain, a preference pair a prompt with two branches, a group a prompt with k. A token to be scored
has `src`, its predecessor on its path: for the first token of a branch that is the last token of the prompt, not i − 1.

Legend: T tokens of a tree or row, S scored tokens, B branches (root-to-leaf paths).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch

# Widths and numbers of scored tokens are rounded up to this: a CPU's matrix libraries keep a compiled kernel for every
# shape they meet, and memory would grow with the variety of lengths (seen: 0.9 against 2.0 GB after 240 steps).
ROUND = 64


@dataclasses.dataclass(frozen=True)
class Node:
    """A run of tokens and what branches off after it. `weights` (one a token) say what is scored; None: nothing."""

    ids: Sequence[int]
    weights: Sequence[float] | None = None
    children: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tree:
    """One example, flattened depth first. All arrays are int32, `weight` float32."""

    ids: np.ndarray  # [T]
    pos: np.ndarray  # [T]
    end: np.ndarray  # [T]
    tgt: np.ndarray  # [S] index of each scored token
    src: np.ndarray  # [S] index of its predecessor
    weight: np.ndarray  # [S]
    branch: np.ndarray  # [S] the first branch that the scored token lies on
    tips: np.ndarray  # [B] index of each branch's last token
    origin: str = ""  # where the example came from, for messages
    root: int = 0  # tokens of the root, which an encoder–decoder's encoder reads; its decoder writes the rest
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name → [S], what a loss reads beside

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int(self.pos.max()) + 1

    def path(self, branch: int) -> np.ndarray:
        """Indices of the tokens from the root to a branch's tip: those that the tip sees."""
        tip = self.tips[branch]
        before = np.arange(tip + 1)
        return before[self.end[: tip + 1] > tip]


def flatten(root: Node, origin: str = "") -> Tree:
    """A tree of nodes → arrays.

    >>> t = flatten(Node([7, 8], children=(Node([1, 2], [1, 1]), Node([3], [1]))))
    >>> t.pos.tolist(), t.end.tolist(), t.src.tolist(), t.tgt.tolist(), t.tips.tolist()
    ([0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [1, 2, 1], [2, 3, 4], [3, 4])
    """
    ids: list[int] = []
    pos: list[int] = []
    end: list[int] = []
    scored: list[tuple[int, int, float, int]] = []
    tips: list[int] = []

    def visit(node: Node, last: int, depth: int) -> None:
        first = len(ids)
        for k, token in enumerate(node.ids):
            at = len(ids)
            weight = node.weights[k] if node.weights is not None else 0.0
            if weight and last >= 0:  # the very first token has no predecessor to be predicted from
                scored.append((at, last, weight, len(tips)))
            ids.append(token)
            pos.append(depth + k)
            last = at
        for child in node.children:
            visit(child, last, depth + len(node.ids))
        if not node.children:
            tips.append(last)
        end.extend([0] * (len(ids) - len(end)))
        end[first : first + len(node.ids)] = [len(ids)] * len(node.ids)

    visit(root, -1, 0)
    tgt, src, weight, branch = zip(*scored, strict=True) if scored else ((), (), (), ())
    i32 = np.int32
    return Tree(
        np.array(ids, i32), np.array(pos, i32), np.array(end, i32), np.array(tgt, i32), np.array(src, i32),
        np.array(weight, np.float32), np.array(branch, i32), np.array(tips, i32), origin, len(root.ids),
    )  # fmt: skip


def chain(ids: Sequence[int], weights: Sequence[float], origin: str = "") -> Tree:
    """One sequence with a weight a token (0: context only); what stands before the first scored token is its root."""
    n = np.arange(len(ids), dtype=np.int32)
    w = np.asarray(weights, np.float32)
    tgt = n[1:][w[1:] != 0]
    return Tree(
        np.asarray(ids, np.int32), n, np.full(len(ids), len(ids), np.int32), tgt, tgt - 1, w[tgt],
        np.zeros(len(tgt), np.int32), n[-1:], origin, int(tgt[0]) if len(tgt) else len(ids),
    )  # fmt: skip


def group(prompt: Sequence[int], completions: Iterable[Sequence[int]], origin: str = "") -> Tree:
    """A prompt with its completions as branches, every completion token scored with weight 1."""
    return flatten(Node(prompt, None, tuple(Node(c, [1.0] * len(c)) for c in completions)), origin)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one forward pass takes: trees side by side, in one or several lanes of equal width.

    T = lanes × width; index i lies in lane i // width. Lanes keep the mask small: it costs lanes × width², and a lane
    need be no longer than its examples. int64 tensors, `weight` float32.
    """

    ids: torch.Tensor  # [T], 0 where a lane is not full
    pos: torch.Tensor  # [T]
    end: torch.Tensor  # [T]; an unused place sees itself alone
    tgt: torch.Tensor  # [S]
    src: torch.Tensor  # [S]
    weight: torch.Tensor  # [S]
    branch: torch.Tensor  # [S] counted through all trees of the row
    tips: torch.Tensor  # [B]
    trees: tuple[Tree, ...]
    starts: tuple[int, ...]  # index of each tree's first token
    lanes: int = 1
    extra: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # name → float32 [S]

    @property
    def tokens(self) -> int:
        """Tokens of its trees; unused places are not counted."""
        return sum(len(t) for t in self.trees)

    def to(self, device: torch.device) -> Row:
        moved = {f.name: v.to(device) for f in dataclasses.fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        extra = {name: v.to(device) for name, v in self.extra.items()}
        return dataclasses.replace(self, **moved, extra=extra)


def join(trees: Sequence[Tree]) -> Row:
    """Trees → one row of one lane; none sees another, because every `end` stays within its tree."""
    return stack([trees])


def stack(lanes: Sequence[Sequence[Tree]], width: int = 0) -> Row:
    """Lanes of trees → one row, every lane as wide as the longest, or as `width` if that is more."""
    width = max(width, max(sum(len(t) for t in lane) for lane in lanes))
    trees = [t for lane in lanes for t in lane]
    starts = [k * width + int(n) for k, lane in enumerate(lanes) for n in np.cumsum([0, *(len(t) for t in lane)])[:-1]]
    first_branch = np.cumsum([0, *(len(t.tips) for t in trees)])[:-1]
    ids = np.zeros(len(lanes) * width, np.int64)
    pos, end = np.zeros_like(ids), np.arange(1, len(ids) + 1)
    for tree, at in zip(trees, starts, strict=True):
        ids[at : at + len(tree)], pos[at : at + len(tree)], end[at : at + len(tree)] = tree.ids, tree.pos, tree.end + at

    def cat(name: str, shift: Sequence[int] | np.ndarray | None = None) -> torch.Tensor:
        parts = [getattr(t, name) + (0 if shift is None else shift[k]) for k, t in enumerate(trees)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32 if name == "weight" else np.int64))

    extra = {name: np.concatenate([t.extra[name] for t in trees]).astype(np.float32) for name in trees[0].extra}
    return Row(
        torch.from_numpy(ids), torch.from_numpy(pos), torch.from_numpy(end), cat("tgt", starts), cat("src", starts),
        cat("weight"), cat("branch", first_branch), cat("tips", starts), tuple(trees), tuple(starts), len(lanes),
        {name: torch.from_numpy(values) for name, values in extra.items()},
    )  # fmt: skip


def rooted(row: Row, n: int) -> Row:
    """A row with n more tokens at the beginning of each lane, the root of all its trees: seen by every token of the lane.

    Their ids are 0, for they stand for embeddings. `trees` and `starts` stay those of the row that was given.
    """
    width = len(row.ids) // row.lanes

    def shifted(index: torch.Tensor) -> torch.Tensor:
        """Where an index of the row comes to lie; one past a lane's last token stays one past it."""
        return index + n * ((index - 1).clamp(min=0) // width + 1)

    lanes = torch.arange(row.lanes, device=row.ids.device)[:, None]
    places = torch.arange(n, device=row.ids.device).expand(row.lanes, n)

    def beside(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return torch.cat([first, rest.view(row.lanes, width)], 1).flatten()

    at = torch.arange(len(row.ids), device=row.ids.device)
    index = at + n * (at // width + 1)
    ends = (lanes + 1) * (width + n)
    return dataclasses.replace(
        row, ids=beside(torch.zeros_like(places), row.ids), pos=beside(places, row.pos + n),
        end=beside(ends.expand(row.lanes, n), shifted(row.end)), tgt=index[row.tgt], src=index[row.src], tips=index[row.tips],
    )  # fmt: skip


def rows_of(trees: Sequence[Tree], row_tokens: int, micro_tokens: int) -> list[Row]:
    """Trees → rows: packed into lanes of `row_tokens`, lanes of like length stacked up to `micro_tokens` a row.

    A tree longer than a lane has one of its own length; a lane longer than `micro_tokens` is a row of its own.
    """
    sizes = [len(t) for t in trees]
    row_tokens = min(row_tokens, micro_tokens)
    lanes = sorted(pack(sizes, row_tokens), key=lambda lane: (-sum(sizes[i] for i in lane), lane))
    rows: list[list[list[int]]] = []
    widths: list[int] = []
    for lane in lanes:
        if not rows or (len(rows[-1]) + 1) * widths[-1] > micro_tokens:
            length = sum(sizes[i] for i in lane)
            rows.append([])
            widths.append(max(length, min(rounded(length), row_tokens)))
        rows[-1].append(lane)
    return [stack([[trees[i] for i in lane] for lane in row], w) for row, w in zip(rows, widths, strict=True)]


def rounded(n: int, multiple: int = ROUND) -> int:
    """The next multiple.

    >>> rounded(64), rounded(65), rounded(65, 32)
    (64, 128, 96)
    """
    return -(-n // multiple) * multiple


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First fit by decreasing length: indices of the examples of each row. One longer than `budget` has a row alone.

    Coffman, Garey and Johnson: at most 11/9 of the fewest rows, plus a constant.

    >>> pack([3, 9, 5, 2, 4], 10)
    [[1], [2, 4], [0, 3]]
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    rows = [[i] for i in order if sizes[i] > budget]
    rest = order[len(rows) :]
    alone, places = len(rows), 1 << max(0, len(rest) - 1).bit_length()
    most = [budget] * (2 * places)  # the most room below each node of a binary tree, whose leaves are rows, used or not
    for index in rest:
        node = 1
        while node < places:
            node = 2 * node + (most[2 * node] < sizes[index])  # the first row with enough room
        if alone + node - places == len(rows):
            rows.append([])
        rows[alone + node - places].append(index)
        most[node] -= sizes[index]
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return rows


def split(tree: Tree, budget: int) -> list[Tree]:
    """A tree too long for a row → trees that repeat what their branches share, each within `budget` where possible.

    Scored tokens that branches share stay scored once, in the first part that holds them, so sums do not change.
    """
    if len(tree) <= budget or len(tree.tips) == 1:
        return [tree]
    parts: list[list[int]] = []
    size = 0
    for b in range(len(tree.tips)):
        path = tree.path(b)
        own = len(path) - (len(np.intersect1d(path, tree.path(parts[-1][-1]))) if parts else 0)
        if parts and size + own <= budget:
            parts[-1].append(b)
            size += own
        else:
            parts.append([b])
            size = len(path)
    return [_part(tree, branches) for branches in parts]


def _part(tree: Tree, branches: list[int]) -> Tree:
    """The subtree of some branches; tokens keep their order, so depth-first order stays."""
    kept = np.unique(np.concatenate([tree.path(b) for b in branches]))
    new = np.full(len(tree) + 1, -1, np.int32)
    new[kept] = np.arange(len(kept), dtype=np.int32)
    end = np.searchsorted(kept, tree.end[kept]).astype(np.int32)
    mine = np.isin(tree.branch, branches)
    order = {b: k for k, b in enumerate(branches)}
    return Tree(
        tree.ids[kept], tree.pos[kept], end, new[tree.tgt[mine]], new[tree.src[mine]], tree.weight[mine],
        np.array([order[int(b)] for b in tree.branch[mine]], np.int32), new[tree.tips[branches]], tree.origin, tree.root,
        {name: values[mine] for name, values in tree.extra.items()},
    )  # fmt: skip
