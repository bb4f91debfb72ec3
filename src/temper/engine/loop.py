"""The one training loop.

It knows micro-batches (rows of trees), a loss, and its `Terms`; no algorithm. All weights of an optimiser step are
known before its first forward pass, so the loss is divided once, by their sum over all micro-batches: the result does
not depend on how a batch was cut. Every step is a function of (state, seed, step), so a resumed run is the same run.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from temper import stopping
from temper.engine import checkpoint, examples, optim, tripwires, watching
from temper.engine.batches import Batches, Source
from temper.engine.device import autocast
from temper.engine.lines import append, forget_after
from temper.engine.processes import Wrapped
from temper.engine.settings import Training, Validated
from temper.engine.spread import full
from temper.engine.streaming import Streaming
from temper.engine.validation import SCORED, TRAINED, Measured, Plan, measure, plan
from temper.errors import RecipeError
from temper.job import Job
from temper.losses import Terms
from temper.models import allocation
from temper.models.products import added_in_place
from temper.models.scores import Policy
from temper.trees import Row

Loss = Callable[..., Terms]  # (what the policy gives of a row [S], weights [S], the row's extra columns by name [S])


class Loop:
    """Trains the trainable parameters of a policy in place.

    Args:
        validation: rows that are scored while training; `plan` says when, and which of them.
        sample: what is shown of the policy after each validation.
        follower: what moves with the policy.
        pieces: token ids → the text of each, for the validation examples with the highest loss; None keeps none.
    """

    def __init__(
        self,
        job: Job,
        policy: Policy,
        loss: Loss,
        batches: Source,
        training: Training,
        precision: str,
        validation: Sequence[Row] = (),
        sample: Callable[[], list[dict[str, str]]] | None = None,
        follower: checkpoint.Follower | None = None,
        pieces: examples.Pieces | None = None,
    ) -> None:
        self.job, self.policy, self.loss, self.batches, self.training = job, policy, loss, batches, training
        self.world = job.world
        self.wrapped = Wrapped(policy, job.world, training.row_tokens, training.micro_tokens)
        self.precision, self.sample, self.pieces = precision, sample, pieces
        self.device = policy.device
        self.steps = training.max_steps or max(1, round(training.epochs * batches.per_epoch))
        self.warmup = optim.warmup_steps(training.warmup, self.steps)
        self.rate = optim.rate_of(training.schedule, self.steps, self.warmup)
        self.allocation = allocation.of(policy.hf, self.steps)
        if self.allocation is not None and self.world.parallel == "fsdp":
            raise RecipeError("adalora moves ranks between layers, which FSDP2 has spread", where=job.name, do="launch: {parallel: ddp}, or method: lora")
        self.followers: list[checkpoint.Follower] = [f for f in (follower, self.allocation) if f is not None]
        watched = training if isinstance(training, Validated) else None
        self.plan = self._plan(watched, validation)
        self.keep_best = watched is not None and watched.keep_best
        self.patience = watched.patience if watched else None
        self.worst = watched.worst if watched and pieces else 0
        self.optimizer = optim.optimizers.get(training.optimizer)(
            optim.groups(policy.named_parameters(), training.lr, training.weight_decay)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        self.root = job.kept / "checkpoints"
        self.metrics, self.samples, self.hardest = (job.dir / f"{n}.jsonl" for n in ("metrics", "samples", "worst"))
        self.machine = watching.Machine(self.device)
        self.state: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "trained_tokens": 0,
            "best": None, "best_step": None, "bad": 0, "stopped": False,
            "rates": [],
            "losses": [],  # of all validations
            "validated_tokens": 0,
            "noise": {},  # of the gradient's norm
        }

    def _plan(self, watched: Validated | None, validation: Sequence[Row]) -> Plan:
        """When to look at which of the validation rows."""
        if watched is None or not validation or not isinstance(self.batches, Batches | Streaming):
            return Plan(max(1, self.steps // 10), list(validation), [], 0.0)
        b = self.batches
        return plan(
            validation, steps=self.steps, trained=b.tokens(self.steps), budget=watched.validation_budget,
            every=watched.evaluate_every, row_tokens=b.row_tokens, micro_tokens=b.micro_tokens, seed=b.seed,
        )  # fmt: skip

    def warnings(self) -> list[str]:
        name, options = optim.named(self.training.schedule)
        needs = {f"the schedule «{name}»": options["patience"] + 1} if name in optim.WATCHING else {}
        if self.patience is not None:
            needs["patience"] = self.patience
        found = tripwires.before(
            steps=self.steps,
            steps_per_epoch=self.batches.per_epoch,
            warmup=self.warmup,
            asked=not self.training.model_fields_set.isdisjoint({"max_steps", "epochs"}),
            validations=-(-self.steps // self.plan.every) if self.plan.rows else 0,
            needs=needs,
        )
        return [*found, *filter(None, [self.plan.warning])]

    def run(self) -> None:
        """From the last good checkpoint to the end.

        Raises:
            TrainingError: a loss or gradient that is no number, or a gradient of zero at the first step.
            Stopped: it was asked for, and a checkpoint is written.
        """
        self._resume()
        saved_at, save_took = time.perf_counter(), 0.0
        with self.job.progress(self.steps, "training", done=self.state["step"]) as bar, stopping.minded():
            while self.state["step"] < self.steps and not self.state["stopped"]:
                shown = self._step()
                step = self.state["step"]
                bar(1, **shown)
                if self.plan.rows and (step % self.plan.every == 0 or step == self.steps):
                    self._validate()
                every = self.training.checkpoint_every
                due = step % every == 0 if every else time.perf_counter() - saved_at > max(20.0, 20 * save_took)
                # clocks differ, and a signal may have reached one process alone
                due, stop = map(bool, self.world.summed([due and self.world.main, stopping.asked()]))
                if due or stop or step == self.steps or self.state["stopped"]:
                    began = time.perf_counter()
                    self._save()
                    saved_at, save_took = time.perf_counter(), time.perf_counter() - began
                if stop and step < self.steps:
                    raise stopping.Stopped(f"step {step} is saved")
        self._end()

    def _end(self) -> None:
        """Warn of what went otherwise than planned, put back the best weights, and score all rows with them."""
        for text in tripwires.after(
            schedule=optim.named(self.training.schedule)[0], rates=self.state["rates"], took=self.state["step"],
            planned=self.steps, steps_per_epoch=self.batches.per_epoch, warmup=self.warmup, peak=self.training.lr,
        ):  # fmt: skip
            self.job.warn(text)
        kept = self.state["best_step"] if self.keep_best and self.state["best_step"] else self.state["step"]
        if kept != self.state["step"]:
            checkpoint.read_weights(self.root / f"best-{kept}", self.policy)
            self.job.say(f"kept the weights of step {kept} (validation loss {self.state['best']:.4f})")
        if self.allocation is not None:
            ranks = self.allocation.ranks()
            self.job.facts["ranks"] = f"{sum(ranks) / len(ranks):g} on average, from {min(ranks)} to {max(ranks)}"
        validated = self.state["validated_tokens"] * SCORED
        if not self.plan.whole:
            found = self.measured(self.plan.rows).with_(self.measured(self.plan.rest), self.worst)
            validated += SCORED * found.tokens
            self._log({"step": kept, "whole": True, "whole_validation_loss": found.loss})
            self._keep_worst(found, kept, whole=True)
            self.job.facts["validation loss, all rows"] = round(found.loss, 6)
            self.job.say(f"validation loss on all rows with the weights of step {kept}: {found.loss:.4f}")
        if validated:
            share = validated / (validated + TRAINED * self.state["tokens"])
            self.job.facts["validation's share of all work"] = f"{share:.1%}"
        self.job.counts.update(
            steps=self.state["step"], tokens=self.state["tokens"], trained_tokens=self.state["trained_tokens"]
        )
        self.wrapped.unwrap()

    def _step(self) -> dict[str, str]:
        """One optimiser step; returns what the progress bar shows of it."""
        began = time.perf_counter()
        step = self.state["step"]
        torch.manual_seed((self.batches.seed * 1_000_003 + step) % 2**63)  # dropout is a function of the step
        lr = self.training.lr * self.rate(step, self.state["losses"])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = self.batches.rows(step)
        loss, extras = self.gradients(rows)
        tripwires.check_loss(loss, step + 1, [t.origin for r in rows for t in r.trees], str(self.root))
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        norm = float(full(torch.nn.utils.clip_grad_norm_(trained, self.training.clip or float("inf"))))
        if self.precision != "fp16":  # with loss scaling an overflow skips the step and lowers the scale
            tripwires.check_gradient(norm, step + 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for follower in self.followers:
            follower.follow()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(r.tokens for r in rows)
        self.state["step"] = step + 1
        self.state["tokens"] += tokens
        self.state["trained_tokens"] += sum(len(r.tgt) for r in rows)
        self.state["rates"] = [*self.state["rates"][:2], lr]
        self.state["noise"] = watching.follow(self.state["noise"], norm)
        took = time.perf_counter() - began
        line = {
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            **watching.noise_of(self.state["noise"]),
            "tokens": self.state["tokens"],
            **extras,
            "tokens_per_second": round(tokens / took, 1),
            "seconds": round(self.job.seconds(), 2),
            **self.machine(),
        }
        self._log(line)
        return watching.shown(line)

    def gradients(self, rows: Sequence[Row]) -> tuple[float, dict[str, float]]:
        """Add the gradients of one optimiser step's rows; returns its loss and the means of what the loss logs beside."""
        divisor = float(sum(r.weight.sum(dtype=torch.float64) for r in rows))
        passes = self.batches.prepared(self.wrapped.passes(rows))  # passes without gradient, dropout off
        self.policy.train()
        total, extras = 0.0, dict[str, float]()
        for n, (row, counts) in enumerate(passes):
            row = row.to(self.device)
            with self.wrapped.gathering(last=n == len(passes) - 1):
                with autocast(self.device, self.precision):
                    terms = self.loss(self.wrapped.module(row), row.weight, **row.extra)
                part = (terms.values * terms.weights).sum() / divisor
                if self.world.size > 1:  # gradients are averaged
                    part = part * (self.world.size if counts else 0)
                with added_in_place(self.world.size == 1):  # what exchanges gradients hears of them by hooks
                    self.scaler.scale(part).backward()
            share = 1 / self.world.size if counts else 0
            total += float(part.detach()) * share
            for name, values in terms.extras.items():
                extras[name] = extras.get(name, 0.0) + float((values * terms.weights).sum()) / divisor * bool(counts)
        if self.world.size > 1:
            names = sorted(extras)
            total, *found = self.world.summed([total, *(extras[name] for name in names)])
            extras = dict(zip(names, found, strict=True))
        if self.allocation is not None:  # no part of the loss that is told: it says nothing of the data
            penalty = self.allocation.penalty()
            self.scaler.scale(penalty).backward()
            extras["orthogonality"] = float(penalty.detach())
        return total, extras

    def measured(self, rows: Sequence[Row]) -> Measured:
        """Losses of validation rows, dropout off."""
        passes = self.wrapped.passes(rows)
        with autocast(self.device, self.precision):
            found = measure(self.policy, self.loss, [row for row, counts in passes if counts], self.device, self.worst)
            measure(self.policy, self.loss, [row for row, counts in passes if not counts], self.device)
        return functools.reduce(lambda a, b: a.with_(b, self.worst), self.world.gathered(found))

    def validation_loss(self) -> float:
        """Mean loss a trained token over the rows of every validation, dropout off."""
        return self.measured(self.plan.rows).loss

    def _validate(self) -> None:
        found, step = self.measured(self.plan.rows), self.state["step"]
        value = found.loss
        tripwires.check_validation(value, step, str(self.root))
        settled = self.allocation is None or self.allocation.settled(step)
        best = settled and (self.state["best"] is None or value < self.state["best"])
        self.state["losses"] = [*self.state["losses"], value]
        self.state["validated_tokens"] += found.tokens
        extras = {f"validation_{name}": total / found.weight for name, total in found.extras.items()}
        self._log({"step": step, "validation_loss": value, "best": best, **extras})
        self._keep_worst(found, step)
        if best:
            self.state.update(best=value, best_step=step, bad=0)
            if self.keep_best:
                noted = {"step": step, "validation_loss": value}
                checkpoint.write(self.root / f"best-{step}", self.policy, None, noted, here=self.world.main)
                self.world.told(lambda: checkpoint.forget_bests(self.root, but=step))
        elif settled:
            self.state["bad"] += 1
            self.state["stopped"] = self.patience is not None and self.state["bad"] >= self.patience
        if self.sample is not None:
            for line in self.sample():
                append(self.samples, {"step": step, **line})

    def _keep_worst(self, found: Measured, step: int, **mark: bool) -> None:
        """The examples with the highest loss, each token's loss beside it."""
        for line in examples.lines(found.worst, self.pieces) if self.pieces else ():
            append(self.hardest, {"step": step, **mark, **line})

    def _save(self) -> None:
        self.job.save_clock()  # before the checkpoint: a run that goes on from it must know what was warned of before
        state = {**self.state, "scaler": self.scaler.state_dict()}
        checkpoint.write(
            self.root / f"step-{self.state['step']}", self.policy, self.optimizer, state, self._following(), here=self.world.main,
        )  # fmt: skip
        self.world.told(lambda: checkpoint.retain(self.root, self.training.keep_checkpoints))

    def _following(self) -> dict[str, torch.Tensor]:
        return {name: tensor for follower in self.followers for name, tensor in follower.tensors().items()}

    def _resume(self) -> None:
        found = self.world.told(self._last_good)
        if found is None:
            for file in (self.metrics, self.samples, self.hardest):
                file.unlink(missing_ok=True)
            return
        folder, state = found
        checkpoint.read_weights(folder, self.policy)
        checkpoint.read_optimizer(folder, self.optimizer)
        checkpoint.read_follower(folder, self._following())
        if self.allocation is not None:
            self.allocation.go_on()
        self.scaler.load_state_dict(state.pop("scaler"))
        self.state = state
        for file in (self.metrics, self.samples, self.hardest):
            forget_after(file, state["step"])
        best = f"; the best weights so far are those of step {state['best_step']}" if state["best_step"] else ""
        self.job.say(f"goes on from step {state['step']}{best}")

    def _last_good(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint whose best weights are there too, or will be made again on the way on."""
        checkpoint.recover(self.root, self.job.say)
        while (found := checkpoint.latest(self.root, self.job.warn)) is not None:
            folder, state = found
            if not self.batches.ready(state["step"]):
                self.job.warn(f"what {folder.name} was in the middle of is damaged or gone; going back before it")
                shutil.rmtree(folder)
                continue
            whole = [b for b in checkpoint.bests(self.root) if checkpoint.problem(b) is None]
            if not self.keep_best or state["best_step"] is None:
                return found
            # a best later than this checkpoint will be met again: the same steps give the same weights
            if any(checkpoint.number(b) == state["best_step"] or checkpoint.number(b) > state["step"] for b in whole):
                return found
            self.job.warn(
                f"the best weights (step {state['best_step']}) are damaged or gone; going back before {folder.name}"
            )
            shutil.rmtree(folder)
        return None

    def _log(self, line: dict[str, Any]) -> None:
        append(self.metrics, line)
