"""From logits to tokens: the distribution that is sampled from, noise that belongs to its token, inverse CDF.

Legend: R rows decoded together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from temper.errors import ModelError
from temper.rollouts.decoding import Decoding, Draft

CANDIDATES = 1024  # top-p looks among this many; rows whose mass lies wider are sorted whole
BLOCK = 256  # tokens summed at once on the way to the inverse CDF
BROKEN = "look at the training before: a loss that grew, lr too high; in fp16 take bf16 or float32"

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014), elementwise on uint64; it wraps around on purpose."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(n: int, *key: int) -> np.ndarray:
    """The first `n` numbers of the stream that belongs to `key`, float64 in [0, 1).

    A SplitMix64 stream whose start is a hash of the key: token t of a completion has number t, wherever and with
    whatever it is drawn.

    >>> bool((uniforms(3, 7, 1) == uniforms(5, 7, 1)[:3]).all()), bool((uniforms(3, 7, 1) == uniforms(3, 1, 7)).any())
    (True, False)
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mixed(state + np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64) + _GAMMA)
    stream = state + np.arange(1, n + 1, dtype=np.uint64) * _GAMMA
    return (_mixed(stream) >> np.uint64(11)) * 2.0**-53


def warped(logits: torch.Tensor, decoding: Decoding, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the distribution sampled from, float32 [R, V], −∞ where a token is ruled out; `logits` stays as it is.

    Penalty, temperature, top-k, top-p, min-p, in this order, which is transformers'. Tokens as likely as the last one
    that top-k or top-p keeps are kept too, so the outcome does not depend on how a sort breaks ties.

    Args:
        logits: float32 [R, V].
        decoding: its temperature must be above 0 unless all that is wanted is the penalty.
        seen: bool [R, V], tokens of prompt and completion so far; needed only with a repetition penalty.
    """
    if decoding.repetition_penalty != 1:  # Keskar et al. 2019, as everybody has it: divide above 0, multiply below
        assert seen is not None
        penalty = decoding.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if decoding.temperature == 0:
        return logits
    if decoding.temperature != 1:
        logits = logits / decoding.temperature
    if decoding.top_k is not None and decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if decoding.top_p < 1:
        logits = logits.masked_fill(logits < _nucleus(logits, decoding.top_p), -torch.inf)
    if decoding.min_p > 0:
        least = logits.amax(-1, keepdim=True) + float(np.log(decoding.min_p))
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest logit [R, 1] of the smallest set whose probability reaches top_p (Holtzman et al. 2019)."""
    total = logits.logsumexp(-1, keepdim=True)

    def least(these: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mass = _running((values - these).double().exp())
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)  # of the tokens before this one
        last = (before < top_p).sum(-1, keepdim=True) - 1
        return values.gather(-1, last), mass[:, -1] >= top_p

    few = min(CANDIDATES, logits.shape[-1])
    found, enough = least(total, logits.topk(few, dim=-1).values)
    if few < logits.shape[-1] and not bool(enough.all()):
        wide = (~enough).nonzero()[:, 0]
        found[wide] = least(total[wide], logits[wide].sort(dim=-1, descending=True).values)[0]
    return found


def held_open(logits: torch.Tensor, drafts: Sequence[Draft]) -> torch.Tensor | None:
    """Logits [R, V] without the end tokens where a completion is still too short to end; None where none is."""
    early = [n for n, draft in enumerate(drafts) if draft.early]
    if not early:
        return None
    out = logits.clone()
    for n in early:
        out[n, torch.tensor(sorted(drafts[n].ends), device=logits.device)] = -torch.inf
    return out


def drawn(logits: torch.Tensor, drafts: Sequence[Draft], seen: torch.Tensor | None = None) -> list[bool]:
    """Give each draft its next token, drawn as it asks and by its own noise; whether each is finished by it.

    Args:
        logits: float32 [R, V], one row a draft.
        seen: see `warped`; the tokens drawn are entered.

    Raises:
        ModelError: logits that are no numbers.
    """
    limited = held_open(logits, drafts)
    noise = torch.tensor([draft.chance for draft in drafts], dtype=torch.float64, device=logits.device)
    alike: dict[object, list[int]] = {}
    for n, draft in enumerate(drafts):
        alike.setdefault(draft.way, []).append(n)
    if len(alike) == 1:
        found = draw(logits, noise, drafts[0].decoding, seen, limited)
    else:
        order = torch.tensor([n for rows in alike.values() for n in rows], device=logits.device)
        parts = []
        for rows in alike.values():
            at = torch.tensor(rows, device=logits.device)
            some = [None if x is None else x.index_select(0, at) for x in (logits, noise, seen, limited)]
            parts.append(draw(some[0], some[1], drafts[rows[0]].decoding, some[2], some[3]))  # type: ignore[arg-type]
        back = order.argsort()
        found = tuple(torch.cat(x).index_select(0, back) for x in zip(*parts, strict=True))
    if seen is not None:
        seen.scatter_(1, found[0][:, None], True)
    for n, tops in _likeliest(logits, drafts).items():
        drafts[n].tops.append(tops)
    return [draft.add(*values) for draft, *values in zip(drafts, *(x.tolist() for x in found), strict=True)]


def _likeliest(logits: torch.Tensor, drafts: Sequence[Draft]) -> dict[int, list[tuple[int, float]]]:
    """The likeliest tokens of the plain softmax with their log-probabilities, for the rows that ask for them."""
    asking = [n for n, draft in enumerate(drafts) if draft.top]
    if not asking:
        return {}
    logps = logits[torch.tensor(asking, device=logits.device)].log_softmax(-1)
    values, ids = logps.topk(min(logps.shape[-1], max(drafts[n].top for n in asking)), dim=-1)
    rows = zip(asking, ids.tolist(), values.tolist(), strict=True)
    return {n: list(zip(i, v, strict=True))[: drafts[n].top] for n, i, v in rows}


def draw(
    logits: torch.Tensor,
    noise: torch.Tensor,
    decoding: Decoding,
    seen: torch.Tensor | None = None,
    limited: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens int64 [R], their log-probabilities under what was sampled from, and under the plain softmax, float32 [R].

    Args:
        logits: float32 [R, V], the model's own.
        noise: float64 [R] in [0, 1), one number a row.
        seen: see `warped`.
        limited: see `held_open`.

    Raises:
        ModelError: logits that are no numbers.
    """
    ours = warped(logits if limited is None else limited, decoding, seen)
    if decoding.temperature == 0:
        tokens, logps = ours.argmax(-1), None
    else:
        tokens, logps = _inverse_cdf(ours, noise)
    if logps is not None and ours is logits:
        raw = logps
    else:
        raw = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    if not bool(torch.isfinite(raw).all()):
        raise ModelError("the model's logits are not numbers: nothing can be sampled", do=BROKEN)
    return tokens, torch.zeros_like(raw) if logps is None else logps, raw


def _inverse_cdf(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token t with P(tokens before t) ≤ noise < P(tokens up to t), and its log-probability.

    In two steps, block and token within it: sums of blocks are fast where a running sum over the vocabulary is not,
    and both running sums are short enough for float64.
    """
    rows, vocabulary = logits.shape
    weights = logits.softmax(-1)
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - vocabulary % BLOCK))
    weights = weights.view(rows, -1, BLOCK)
    blocks = _running(weights.sum(-1).double())  # [R, blocks]
    block, rest = _found(blocks, noise[:, None] * blocks[:, -1:])
    within = weights[torch.arange(rows, device=logits.device), block[:, 0]]  # [R, BLOCK]
    place, _ = _found(_running(within.double()), rest)
    return (block * BLOCK + place)[:, 0].clamp_(max=vocabulary - 1), within.gather(-1, place)[:, 0].log()


def _running(values: torch.Tensor) -> torch.Tensor:
    """Running sums of [R, N] along rows. A graphics card's own may differ from run to run, and deterministic algorithms
    refuse them; there they are products with a triangle of ones, in blocks."""
    return values.cumsum(-1) if values.device.type != "cuda" else _by_triangles(values)


def _by_triangles(values: torch.Tensor) -> torch.Tensor:
    rows, n = values.shape
    more = -n % BLOCK
    parts = torch.nn.functional.pad(values, (0, more)).reshape(rows, -1, BLOCK)
    within = parts @ torch.ones(BLOCK, BLOCK, dtype=values.dtype, device=values.device).triu()
    if parts.shape[1] > 1:
        totals = _by_triangles(within[:, :-1, -1])
        within = within + torch.nn.functional.pad(totals, (1, 0))[..., None]
    return within.flatten(1)[:, :n]


def _found(sums: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First place [R, 1] of the running sums [R, N] above `wanted`, and what of `wanted` remains there.

    Rounding must not carry `wanted` past the end: a place that adds nothing is never found.
    """
    wanted = torch.minimum(wanted, torch.nextafter(sums[:, -1:], torch.zeros_like(wanted)))
    place = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[-1] - 1)  # past the end only for nan
    before = torch.where(place > 0, sums.gather(-1, (place - 1).clamp(min=0)), 0.0)
    return place, wanted - before
