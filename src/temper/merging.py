"""Rules that merge models, as functions of task vectors.

A rule takes the task vectors of one tensor (trained minus start: δ_m = θ_m − θ_0, never raw weights, which are nearly
parallel whatever was trained) and gives the task vector of the merge. Rules that take the models for parts of a whole
(lerp, slerp) read `weights` as shares, of which only the ratio counts; the others multiply by them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Le

from temper.errors import ModelError
from temper.registry import Registry

Share = Annotated[float, Gt(0), Le(1)]
Rule = Callable[..., torch.Tensor]  # (task vectors of one tensor, weights or None, the tensor's name, *, options)
rules: Registry[Rule] = Registry("merge rule")

STEPS = 100  # of the spherical mean; it takes one for two vectors and some ten for many
SPREAD = 1e-3  # below this the directions cancel out, and nothing on the sphere is their mean


@rules.register("lerp")
def lerp(deltas: Sequence[torch.Tensor], weights: Sequence[float] | None = None, name: str = "") -> torch.Tensor:
    """The average, δ = Σ λ_m·δ_m with Σ λ_m = 1 ("model soup").

    Wortsman et al. 2022, "Model soups". It shortens: two orthogonal vectors of one length give one of 0.71 of it.

    >>> lerp([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]).tolist()
    [1.5, 2.0]
    """
    return _sum(deltas, shares(weights, len(deltas)))


@rules.register("slerp")
def slerp(deltas: Sequence[torch.Tensor], weights: Sequence[float] | None = None, name: str = "") -> torch.Tensor:
    """The spherical mean, which keeps the length that the average loses: δ = Σ c_m·δ_m, for any number of models.

    For two this is WARP's formula (Ramé et al. 2024, equation SLERP; Shoemake 1985), with Ω the angle between them:
    δ = sin((1 − λ)Ω)/sin Ω · δ_1 + sin(λΩ)/sin Ω · δ_2. For more the paper merges one after another (equation 26), which
    depends on the order. Here the directions u_m = δ_m / ‖δ_m‖ have the Karcher mean u, the point of the sphere with
    the least Σ λ_m·θ_m², θ_m being the angle between u and u_m. There Σ λ_m·(θ_m / sin θ_m)·(u_m − cos θ_m·u) = 0,
    hence u = Σ c_m·u_m with c_m = λ_m·(θ_m / sin θ_m) / Σ_j λ_j·θ_j·cot θ_j, and for two these c are those of the formula.

    Vectors of one length give one of that length. Parallel ones are averaged. One of zero has no direction: it is taken
    to lie in the mean's, so that beside one other it is averaged. Where the directions cancel out (two opposite ones)
    nothing on the sphere is their mean, and the average is taken.

    >>> [round(x, 4) for x in slerp([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]).tolist()]  # sin 45° = 0.7071
    [2.1213, 2.8284]
    """
    share = shares(weights, len(deltas))
    used = [m for m, w in enumerate(share) if w > 0]
    if len(used) == 1:
        return deltas[used[0]].clone()
    gram = torch.tensor([[_dot(deltas[a], deltas[b]) for b in used] for a in used], dtype=torch.float64)
    found = spherical(gram, torch.tensor([share[m] for m in used], dtype=torch.float64))
    return _sum([deltas[m] for m in used], found)


def spherical(gram: torch.Tensor, share: torch.Tensor) -> list[float]:
    """Coefficients of the spherical mean from inner products of the vectors [M, M] and their shares [M], in float64.

    Everything happens in the vectors' span: u = Σ b_m·u_m is kept as b, and cos θ = G·b with G the cosines.
    """
    length = gram.diagonal().clamp(min=0).sqrt()
    there = length > 0
    if not there.any():
        return share.tolist()
    norm = length[there]
    cosines = (gram[there][:, there] / norm / norm[:, None]).clamp(-1, 1)
    weight = share[there] / share[there].sum()
    size = (weight @ cosines @ weight).clamp(min=0).sqrt()
    if size < SPREAD:
        return share.tolist()
    mean = weight / size
    for _ in range(STEPS):  # gradient descent of step 1 with the exponential map: for two it is there at once
        cos = (cosines @ mean).clamp(-1, 1)
        pull = weight * _over_sine(cos)
        ahead = pull - (pull @ cos) * mean
        far = (ahead @ cosines @ ahead).clamp(min=0).sqrt()
        if far < 1e-14:
            break
        mean = far.cos() * mean + far.sin() / far * ahead
        mean = mean / (mean @ cosines @ mean).sqrt()
    cos = (cosines @ mean).clamp(-1, 1)
    pull = share[there] * _over_sine(cos)
    total = pull @ cos + share[~there].sum()  # one of zero: θ = 0 by definition
    if total < SPREAD:
        return share.tolist()
    out = torch.zeros_like(share)
    out[there] = pull / total
    return out.tolist()


def _over_sine(cos: torch.Tensor) -> torch.Tensor:
    """θ / sin θ; 1 at θ = 0."""
    angle = cos.arccos()
    return torch.where(angle < 1e-6, torch.ones_like(angle), angle / angle.sin().clamp(min=1e-12))


@rules.register("task_arithmetic")
def task_arithmetic(
    deltas: Sequence[torch.Tensor], weights: Sequence[float] | None = None, name: str = ""
) -> torch.Tensor:
    """The sum, δ = Σ w_m·δ_m; each weight is 1 unless given.

    Ilharco et al. 2023, "Editing models with task arithmetic", section 2.

    >>> task_arithmetic([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])], [0.5, -1.0]).tolist()
    [1.5, -4.0]
    """
    return _sum(deltas, scaled(weights, len(deltas)))


@rules.register("ties")
def ties(
    deltas: Sequence[torch.Tensor], weights: Sequence[float] | None = None, name: str = "", *, density: Share = 0.2
) -> torch.Tensor:
    """TIES: of each vector the largest entries; of each entry the sign that weighs more; the mean of those that have it.

    Yadav et al. 2023, "TIES-Merging", algorithm 1, with the trimming tensor by tensor and the weights as in PEFT: the
    sign is elected before them, and their sum is divided by the number of vectors that agree. Each is 1 unless given.

    Args:
        density: share of each vector's entries that is kept.

    >>> a, b = torch.tensor([4.0, -3.0, 1.0]), torch.tensor([2.0, 5.0, 0.5])
    >>> ties([a, b], density=0.7).tolist()  # two of three are kept; entry 0: (4 + 2) / 2, entry 1: 5 outweighs -3
    [3.0, 5.0, 0.0]
    """
    factor = scaled(weights, len(deltas))
    kept = [_largest(delta, density) for delta in deltas]
    sign = torch.where(_sum(kept, [1.0] * len(kept)) >= 0, 1.0, -1.0)
    agree = [delta.sign() == sign for delta in kept]
    total = _sum([d * a for d, a in zip(kept, agree, strict=True)], factor)
    return total / torch.stack(agree).sum(0).clamp(min=1)


@rules.register("dare")
def dare(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    name: str = "",
    *,
    density: Share = 0.5,
    seed: int = 0,
) -> torch.Tensor:
    """DARE: entries dropped at random, the others divided by the share that stays; then δ = Σ w_m·δ_m.

    Yu et al. 2024, "Language models are super Mario", equation 3. Each weight is 1 / M unless given: in expectation the
    merge is then the average.

    Args:
        density: share of the entries that is kept.
        seed: what is dropped is a function of this, of the tensor's name and of the order of the models.

    >>> found = dare([torch.ones(4)], density=0.5)
    >>> set(found.tolist()) <= {0.0, 2.0}
    True
    """
    noise = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    kept = [d * torch.bernoulli(torch.full_like(d, density), generator=noise) / density for d in deltas]
    return _sum(kept, scaled(weights, len(deltas), 1 / len(deltas)))


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights as parts of 1; equal ones where none are given.

    Raises:
        ModelError: another number than there are models, one below 0, or a sum of 0.
    """
    given = scaled(weights, count)
    if min(given) < 0 or sum(given) == 0:
        raise ModelError(
            f"weights {given} are no shares: none may be below 0, and not all may be 0",
            where="weights",
            do="rule: task_arithmetic takes any factors",
        )
    return [w / sum(given) for w in given]


def scaled(weights: Sequence[float] | None, count: int, default: float = 1.0) -> list[float]:
    """Weights as they are; ModelError for another number than there are models, or one that is no number."""
    if weights is not None and (len(weights) != count or not all(map(math.isfinite, weights))):
        raise ModelError(f"weights {list(weights)} for {count} models", where="weights", do="give one number a model")
    return list(weights) if weights is not None else [default] * count


def _sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    out = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        out.add_(delta, alpha=weight)
    return out


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    mask = torch.zeros_like(delta).reshape(-1)
    mask[delta.abs().reshape(-1).topk(int(density * delta.numel())).indices] = 1
    return delta * mask.reshape(delta.shape)
