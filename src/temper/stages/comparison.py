"""From log-probabilities of tokens to a preference loss of whole answers, exact however a step is cut.

Most losses of pairs know one pair at a time. Others (`aot`, `bco_pair`, `kto`) are functions F of all log-probabilities
s of the step's answers. Where such a step is cut into several micro-batches, its rows are first passed without gradient;
F and its slopes g = ∂F/∂s are taken there, and the pass that trains is given Σ gᵢ·(sᵢ − sg(sᵢ)) beside the value: the
same number, and by the chain rule the same gradient, with the memory of one micro-batch.

Legend: S scored tokens of a row, C its couples of answers (2C answers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from temper.engine.device import autocast
from temper.job import Job
from temper.losses import Terms
from temper.losses.mixtures import Mixture, mixture, parts_of, unpaired
from temper.losses.preference import Compared
from temper.models.scores import Policy
from temper.trees import Row

MEMORY = 10  # steps, about, over which falling log-probabilities are averaged


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a recipe's `loss` asks of couples of answers."""

    pairs: Mixture | None  # None: rows with a label
    single: Callable[..., torch.Tensor] | None
    beta: float  # of the rewards that are logged; 1 where no part has one
    averaged: bool  # the rewards are means over tokens

    @staticmethod
    def of(spec: Any) -> Objective:
        """Raises RecipeError: see `losses.mixtures`."""
        single, parts = unpaired(spec), parts_of(spec)
        beta = next((float(p.options["beta"]) for p in parts if "beta" in p.options), 1.0)
        averaged = parts[0].name in ("ipo", "sigmoid_norm", "simpo", "orpo")
        return Objective(None if single else mixture(spec), single, beta, averaged)

    @property
    def reference_free(self) -> bool:
        return self.pairs is not None and self.pairs.reference_free

    @property
    def coupled(self) -> bool:
        """Whether the value of a couple depends on the others of the step."""
        return self.pairs is None or self.pairs.coupled

    def values(self, some: Compared, desirable: torch.Tensor | None) -> torch.Tensor:
        """Unreduced, with gradient [C]. `desirable` [C] are the labels of rows that have one."""
        if self.pairs is not None:
            return self.pairs(some)
        assert self.single is not None and desirable is not None
        return self.single(some.chosen, some.ref_chosen, desirable > 0, z0(some))

    def extras(self, some: Compared, desirable: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What is logged of each couple [C]: rewards β·(log π − log π_ref), and how the policy orders the answers."""
        first, second = some.chosen_ratio.detach(), some.rejected_ratio.detach()
        if self.averaged:
            first, second = first / some.chosen_length, second / some.rejected_length
        first, second = self.beta * first, self.beta * second
        if desirable is None:
            return {
                "margin": first - second,
                "accuracy": ((first - second).sign() + 1) / 2,  # a tie counts half
                "reward_chosen": first,
                "reward_rejected": second,
                "logp_chosen": some.chosen.detach(),
                "logp_rejected": some.rejected.detach(),
            }
        kl = self.beta * z0(some)
        right = (desirable * 2 - 1) * (first - kl)
        return {
            "margin": right,
            "accuracy": (right.sign() + 1) / 2,
            "reward": first,
            "kl": kl.expand(len(first)),
            "logp": some.chosen.detach(),
        }


def z0(some: Compared) -> torch.Tensor:
    """KTO's estimate of the KL: the mean log-ratio of answers to other prompts, not below 0, without gradient."""
    return some.rejected_ratio.detach().mean().clamp(min=0)


def compared(
    logps: torch.Tensor, answer: torch.Tensor, reference: torch.Tensor | None
) -> tuple[Compared, torch.Tensor]:
    """Log-probabilities of tokens → those of whole answers, and the couple that each token belongs to [S].

    Args:
        logps: of the scored tokens, nats [S].
        answer: number of each token's answer [S]; 2n and 2n + 1 make a couple.
        reference: log-probabilities under the reference [S]; None: zeros.
    """
    found, place = answer.unique(return_inverse=True)

    def summed(values: torch.Tensor) -> list[torch.Tensor]:
        # index_add, whose backward pass is the same at each run
        return list(values.new_zeros(len(found)).index_add(0, place, values).view(-1, 2).unbind(1))

    parts = [logps, torch.zeros_like(logps) if reference is None else reference, torch.ones_like(logps)]
    (chosen, rejected), (ref_c, ref_r), (long_c, long_r) = map(summed, parts)
    return Compared(chosen, rejected, ref_c, ref_r, long_c, long_r), place // 2


class Comparison:
    """The loss that the loop calls, the columns that a step's rows get before, and what is watched on the way.

    Args:
        reference: log-probabilities of a row's scored tokens [S]; None where the rows bring them, or no loss reads them.
        falling: warn when the answers of both sides have become less likely than at the start by more than this, in nats
            a token; None: never.
        anchored: the reference is the policy as it was at the start.
    """

    def __init__(
        self,
        job: Job,
        policy: Policy,
        objective: Objective,
        reference: Callable[[Row], torch.Tensor] | None,
        precision: str,
        *,
        falling: float | None,
        anchored: bool,
    ) -> None:
        self.job, self.policy, self.objective, self.reference = job, policy, objective, reference
        self.precision, self.falling, self.anchored = precision, falling, anchored
        self.told = torch.zeros(5, dtype=torch.float64)  # steps; mean fall of either side; where either side began
        self.seen = torch.zeros(4, dtype=torch.float64)  # in this step: changes of either side, and tokens

    # What a step's rows get before the pass that trains

    def prepared(self, rows: Sequence[Row], counts: Sequence[bool] | None = None) -> list[Row]:
        """Rows with the reference's log-probabilities and, where couples depend on one another, values and slopes.

        Args:
            counts: which of them are part of the step; the others keep step with other processes.
        """
        self.seen.zero_()
        rows = [self.with_reference(row) for row in rows]
        several = len(rows) > 1 or self.job.world.size > 1
        return self._with_slopes(rows, counts or [True] * len(rows)) if self.objective.coupled and several else rows

    def with_reference(self, row: Row) -> Row:
        """A row with the column `reference`, computed without dropout; one that has it stays as it is."""
        if self.reference is None or "reference" in row.extra:
            return row
        return _with(row, reference=self._scored(self.reference, row))

    def _with_slopes(self, rows: list[Row], counts: Sequence[bool]) -> list[Row]:
        device, world = self.policy.device, self.job.world
        parts = [
            compared(self._scored(self.policy, row), row.extra["answer"].to(device), _column(row, "reference", device))
            for row in rows
        ]
        labels = [_label(_column(row, "desirable", device), place) for row, (_, place) in zip(rows, parts, strict=True)]
        taken = [(p, x) for (p, _), x, c in zip(parts, labels, counts, strict=True) if c]
        by_rank = world.gathered(taken)
        every = [part for some in by_rank for part in some]
        ahead = sum(len(p.chosen) for some in by_rank[: world.rank] for p, _ in some)  # couples of the processes before
        whole = [torch.cat([getattr(p, f.name) for p, _ in every]) for f in dataclasses.fields(Compared)]
        chosen, rejected = (t.detach().requires_grad_() for t in whole[:2])
        with torch.enable_grad():
            given = [x for _, x in every if x is not None]
            values = self.objective.values(Compared(chosen, rejected, *whole[2:]), torch.cat(given) if given else None)
            slopes = torch.autograd.grad(values.sum(), (chosen, rejected), allow_unused=True)
        found = [values.detach(), *(torch.zeros_like(values) if g is None else g for g in slopes)]
        found = [t[ahead:] for t in found]
        # what does not count is given zeros
        columns, at = [], 0
        for (part, _), c in zip(parts, counts, strict=True):
            size = len(part.chosen)
            columns.append([t[at : at + size] if c else t.new_zeros(size) for t in found])
            at += size * c
        out = []
        for row, (_, place), (value, first, second) in zip(rows, parts, columns, strict=True):
            side = row.extra["answer"].to(device) % 2
            slope = torch.where(side == 0, first.index_select(0, place), second.index_select(0, place))
            out.append(_with(row, value=value.index_select(0, place), slope=slope))
        return out

    @torch.no_grad()
    def _scored(self, model: Callable[[Row], torch.Tensor], row: Row) -> torch.Tensor:
        self.policy.eval()
        with autocast(self.policy.device, self.precision):
            return model(row.to(self.policy.device))

    # What the loop calls

    def loss(
        self,
        logps: torch.Tensor,
        weights: torch.Tensor,
        *,
        answer: torch.Tensor,
        reference: torch.Tensor | None = None,
        desirable: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        slope: torch.Tensor | None = None,
    ) -> Terms:
        """Each token carries its couple's value; the weights of a couple's tokens sum to 1.

        Of validation rows a coupled loss is that of each row by itself: they have no columns `value` and `slope`.
        """
        some, place = compared(logps, answer, reference)
        labels = _label(desirable, place)
        if value is None or slope is None:
            values = self.objective.values(some, labels).index_select(0, place)
        else:  # the couple's slopes, spread over its tokens so that their weighted sum is whole
            values = value + slope * (logps - logps.detach()) / weights
        if torch.is_grad_enabled():
            self._note(some)
        extras = self.objective.extras(some, labels)
        return Terms(values, weights, {name: x.index_select(0, place) for name, x in extras.items()})

    # Told of every step; what it remembers is part of each checkpoint

    def follow(self) -> None:
        """Warn where both sides fall."""
        if self.job.world.size > 1:
            self.seen = torch.tensor(self.job.world.summed(self.seen.tolist()), dtype=torch.float64)
        if self.falling is None or self.objective.pairs is None or not self.seen[2:].all():
            return
        now = self.seen[:2] / self.seen[2:]
        if not self.told[0]:
            self.told[3:] = 0 if self.anchored else now
        self.told[0] += 1
        self.told[1:3] += (now - self.told[3:] - self.told[1:3]) / min(float(self.told[0]), MEMORY)
        if self.told[0] >= MEMORY and (self.told[1:3] < -self.falling).all():
            # one sentence without the numbers of the step, so that it is said once
            self.job.warn(
                f"both the chosen and the rejected answers have become less likely than at the start, by more than "
                f"{self.falling:g} nats a token: the margin grows while what is chosen is unlearnt; a larger beta, a lower "
                "lr, or a loss that holds the chosen answer (nca_pair, apo_zero, or sft beside it) keeps it up"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `follow` remembers."""
        return {"told": self.told}

    @torch.no_grad()
    def _note(self, some: Compared) -> None:
        pairs = (some.chosen_ratio, some.rejected_ratio) if self.anchored else (some.chosen, some.rejected)
        parts = [*pairs, some.chosen_length, some.rejected_length]
        self.seen += torch.stack([p.sum(dtype=torch.float64) for p in parts]).cpu()


def _label(desirable: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor | None:
    """Labels of tokens [S] → of couples [C]."""
    if desirable is None:
        return None
    count = int(place.max()) + 1
    return desirable.new_zeros(count).scatter_reduce(0, place, desirable, "amax")


def _column(row: Row, name: str, device: torch.device) -> torch.Tensor | None:
    return row.extra[name].to(device) if name in row.extra else None


def _with(row: Row, **columns: torch.Tensor) -> Row:
    return dataclasses.replace(row, extra={**row.extra, **columns})
