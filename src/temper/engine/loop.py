"""The one training loop.

It knows micro-batches (rows of trees), a loss, and its `Terms`; no algorithm. All weights of an optimiser step are
known before its first forward pass, so the loss is divided once, by their sum over all micro-batches: the result does
not depend on how a batch was cut. Every step is a function of (state, seed, step), so a resumed run is the same run.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from temper.engine import checkpoint, optim, tripwires
from temper.engine.batches import Source
from temper.engine.device import Precision, autocast
from temper.job import Job
from temper.losses import Terms
from temper.models.scores import Policy
from temper.recipe import Config, detail
from temper.runfolder import write_atomic
from temper.trees import Row

Loss = Callable[..., Terms]  # (what the policy gives of a row [S], weights [S], the row's extra columns by name [S])


class Training(Config):
    """Fields that every training stage shares."""

    epochs: float = detail(1.0, "Passes over the data; max_steps overrides it.", gt=0)
    max_steps: int | None = detail(None, "Optimiser steps, whatever the number of epochs.", ge=1)
    batch_size: int = detail(
        16, "Examples a micro-step; an optimiser step takes batch_size × accumulation of them.", ge=1
    )
    accumulation: int = detail(
        1, "Multiplies batch_size. Memory is set by micro_tokens alone; results do not depend on the cut.", ge=1
    )
    row_tokens: int = detail(256, "Examples are packed into rows of this many tokens; a longer one has its own.", ge=16)
    micro_tokens: int = detail(
        2048, "Tokens of one forward pass: rows stacked. It sets the memory; results do not depend on it.", ge=16
    )
    lr: float = detail(1e-4, "Peak learning rate.", gt=0)
    optimizer: str = detail("adamw", "adamw, sgd, or adamw_8bit (extra bnb).")
    schedule: str = detail("cosine", "cosine, linear or constant; see `temper list schedules`.")
    warmup: float = detail(0.03, "Warm-up: steps, or a share of them when below 1.", ge=0)
    weight_decay: float = detail(0.0, "Decoupled weight decay of matrices.", ge=0)
    clip: float = detail(1.0, "Largest gradient norm; 0: no clipping.", ge=0)
    precision: Precision = detail(
        "auto", "float32, bf16, fp16 (with loss scaling), or auto: bf16 on GPUs that have it, else float32."
    )
    activation_checkpointing: bool = detail(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    checkpoint_every: int | None = detail(
        None, "Steps between checkpoints; null: by time, at most 5 % of it.", ge=1, affects_result=False
    )
    keep_checkpoints: int = detail(2, "Newest checkpoints kept while training.", ge=1, affects_result=False)


class Validated(Training):
    """Fields of the stages that look at a validation split while they train."""

    evaluate_every: int | None = detail(None, "Steps between validations; null: ten over the run.", ge=1)
    keep_best: bool = detail(True, "End with the weights of the best validation instead of the last.")
    patience: int | None = detail(None, "Stop after this many validations without improvement.", ge=1)


class Follower(Protocol):
    """What moves with the policy: it is told of every optimiser step, and its tensors are part of each checkpoint."""

    def follow(self) -> None: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...


class Loop:
    """Trains the trainable parameters of a policy in place."""

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
        follower: Follower | None = None,
    ) -> None:
        self.job, self.policy, self.loss, self.batches, self.training = job, policy, loss, batches, training
        self.precision, self.validation, self.sample, self.follower = precision, validation, sample, follower
        self.device = policy.device
        self.steps = training.max_steps or max(1, round(training.epochs * batches.per_epoch))
        self.warmup = optim.warmup_steps(training.warmup, self.steps)
        watched = training if isinstance(training, Validated) else None
        self.evaluate_every = (watched and watched.evaluate_every) or max(1, self.steps // 10)
        self.keep_best = watched is not None and watched.keep_best
        self.patience = watched.patience if watched else None
        self.optimizer = optim.optimizers.get(training.optimizer)(
            optim.groups(policy.named_parameters(), training.lr, training.weight_decay)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
        self.root = job.dir / "checkpoints"
        self.metrics, self.samples = job.dir / "metrics.jsonl", job.dir / "samples.jsonl"
        self.state: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "trained_tokens": 0,
            "best": None,
            "best_step": None,
            "bad": 0,
            "stopped": False,
            "rates": [],
        }

    def warnings(self) -> list[str]:
        return tripwires.before(
            steps=self.steps,
            steps_per_epoch=self.batches.per_epoch,
            warmup=self.warmup,
            asked=not self.training.model_fields_set.isdisjoint({"max_steps", "epochs"}),
        )

    def run(self) -> None:
        """From the last good checkpoint to the end.

        Raises:
            TrainingError: a loss or gradient that is no number, or a gradient of zero at the first step.
        """
        self._resume()
        saved_at, save_took = time.perf_counter(), 0.0
        with self.job.progress(self.steps, "training", done=self.state["step"]) as bar:
            while self.state["step"] < self.steps and not self.state["stopped"]:
                loss = self._step()
                step = self.state["step"]
                bar(1, loss=f"{loss:.3f}")
                if self.validation and (step % self.evaluate_every == 0 or step == self.steps):
                    self._validate()
                every = self.training.checkpoint_every
                due = step % every == 0 if every else time.perf_counter() - saved_at > max(20.0, 20 * save_took)
                if due or step == self.steps or self.state["stopped"]:
                    began = time.perf_counter()
                    self._save()
                    saved_at, save_took = time.perf_counter(), time.perf_counter() - began
        for text in tripwires.after(
            schedule=self.training.schedule, rates=self.state["rates"], took=self.state["step"], planned=self.steps
        ):
            self.job.warn(text)
        if self.keep_best and self.state["best_step"] not in (None, self.state["step"]):
            checkpoint.read_weights(self.root / f"best-{self.state['best_step']}", self.policy)
            self.job.say(
                f"kept the weights of step {self.state['best_step']} (validation loss {self.state['best']:.4f})"
            )
        self.job.counts.update(
            steps=self.state["step"], tokens=self.state["tokens"], trained_tokens=self.state["trained_tokens"]
        )

    def _step(self) -> float:
        """One optimiser step; returns its loss."""
        began = time.perf_counter()
        step = self.state["step"]
        torch.manual_seed((self.batches.seed * 1_000_003 + step) % 2**63)  # dropout is a function of the step
        lr = self.training.lr * optim.schedules.get(self.training.schedule)(step, self.steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = self.batches.rows(step)
        loss, extras = self.gradients(rows)
        tripwires.check_loss(loss, step + 1, [t.origin for r in rows for t in r.trees], str(self.root))
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.training.clip or float("inf")))
        if self.precision != "fp16":  # with loss scaling an overflow skips the step and lowers the scale
            tripwires.check_gradient(norm, step + 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.follower is not None:
            self.follower.follow()
        tokens = sum(r.tokens for r in rows)
        self.state["step"] = step + 1
        self.state["tokens"] += tokens
        self.state["trained_tokens"] += sum(len(r.tgt) for r in rows)
        self.state["rates"] = [*self.state["rates"][:2], lr]
        took = time.perf_counter() - began
        line = {
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": self.state["tokens"],
            **extras,
        }
        self._log({**line, "tokens_per_second": round(tokens / took, 1), "seconds": round(self.job.seconds(), 2)})
        return loss

    def gradients(self, rows: Sequence[Row]) -> tuple[float, dict[str, float]]:
        """Add the gradients of one optimiser step's rows; returns its loss and the means of what the loss logs beside."""
        divisor = float(sum(r.weight.sum(dtype=torch.float64) for r in rows))
        self.policy.train()
        total, extras = 0.0, dict[str, float]()
        for row in rows:
            row = row.to(self.device)
            with autocast(self.device, self.precision):
                terms = self.loss(self.policy(row), row.weight, **row.extra)
            part = (terms.values * terms.weights).sum() / divisor
            self.scaler.scale(part).backward()
            total += float(part.detach())
            for name, values in terms.extras.items():
                extras[name] = extras.get(name, 0.0) + float((values * terms.weights).sum()) / divisor
        return total, extras

    def validation_loss(self) -> float:
        """Mean loss a trained token over the validation rows, dropout off."""
        self.policy.eval()
        total = weight = 0.0
        with torch.no_grad(), autocast(self.device, self.precision):
            for row in self.validation:
                row = row.to(self.device)
                terms = self.loss(self.policy(row), row.weight, **row.extra)
                total += float((terms.values * terms.weights).sum(dtype=torch.float64))
                weight += float(terms.weights.sum(dtype=torch.float64))
        return total / weight

    def _validate(self) -> None:
        value, step = self.validation_loss(), self.state["step"]
        tripwires.check_validation(value, step, str(self.root))
        best = self.state["best"] is None or value < self.state["best"]
        self._log({"step": step, "validation_loss": value, "best": best})
        if best:
            self.state.update(best=value, best_step=step, bad=0)
            if self.keep_best:
                checkpoint.write(
                    self.root / f"best-{step}", self.policy, None, {"step": step, "validation_loss": value}
                )
                checkpoint.forget_bests(self.root, but=step)
        else:
            self.state["bad"] += 1
            self.state["stopped"] = self.patience is not None and self.state["bad"] >= self.patience
        if self.sample is not None:
            for line in self.sample():
                append(self.samples, {"step": step, **line})

    def _save(self) -> None:
        self.job.save_clock()  # before the checkpoint: a run that goes on from it must know what was warned of before
        state = {**self.state, "scaler": self.scaler.state_dict()}
        more = self.follower.tensors() if self.follower is not None else None
        checkpoint.write(self.root / f"step-{self.state['step']}", self.policy, self.optimizer, state, more)
        checkpoint.retain(self.root, self.training.keep_checkpoints)

    def _resume(self) -> None:
        found = self._last_good()
        if found is None:
            for file in (self.metrics, self.samples):
                file.unlink(missing_ok=True)
            return
        folder, state = found
        checkpoint.read_weights(folder, self.policy)
        checkpoint.read_optimizer(folder, self.optimizer)
        if self.follower is not None:
            checkpoint.read_follower(folder, self.follower.tensors())
        self.scaler.load_state_dict(state.pop("scaler"))
        self.state = state
        for file in (self.metrics, self.samples):
            forget_after(file, state["step"])
        self.job.say(f"goes on from step {self.state['step']}")

    def _last_good(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint whose best weights are there too, or will be made again on the way on."""
        checkpoint.recover(self.root)
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
            if any(_number(b) == state["best_step"] or _number(b) > state["step"] for b in whole):
                return found
            self.job.warn(
                f"the best weights (step {state['best_step']}) are damaged or gone; going back before {folder.name}"
            )
            shutil.rmtree(folder)
        return None

    def _log(self, line: dict[str, Any]) -> None:
        append(self.metrics, line)


def append(file: Path, line: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a kill cut short: those steps will be taken again."""
    if file.exists():
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 may stand in an answer
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_atomic(file, "".join(f"{line}\n" for line in kept))


def _number(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
