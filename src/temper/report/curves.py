"""metrics.jsonl → small plots. Every number a stage logs is drawn; nobody has to register it here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from markupsafe import Markup

from temper.report.phrases import compact
from temper.report.plots import Series, lines

AXES = {"step", "tokens", "seconds", "best", "whole_validation_loss"}  # not curves: on every line, or once
NAMES = {
    "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s",
    "reward_std": "spread of rewards in a group", "groups_without_variance": "groups of equal rewards, share",
    "kl": "KL to the start, nats a token", "entropy": "entropy, nats a token", "length": "completion length, tokens",
    "cut": "cut by the length limit, share", "ratio": "ratio to the sampling policy",
    "distinct_2": "distinct pairs of words, share", "self_bleu": "self-BLEU of a rollout",
    "loop_share": "looping texts, share", "same_opening": "texts with one opening, share",
    "grad_noise": "noise of the gradient norm, share of it", "cpu_percent": "processor, % of one core",
    "memory_gb": "memory, GB", "gpu_percent": "GPU use, %", "gpu_memory_gb": "GPU memory, GB",
    "clipped": "clipped tokens, share", "sampling_gap": "sampling gap, nats a token",
    "engine_gap": "the server's log-probabilities off the policy's, nats a token",
    "engine_lag": "what the server lacks of the adapter, share",
}  # fmt: skip
PART = "reward_"  # of a part of the reward
# In the order of reading; the loss and what is not named here stand between.
FIRST = [
    "reward",
    PART,
    "reward_std",
    "groups_without_variance",
    "kl",
    "entropy",
    "length",
    "cut",
    "distinct_2",
    "self_bleu",
    "loop_share",
    "same_opening",
]
MACHINE = ["tokens_per_second", "cpu_percent", "memory_gb", "gpu_percent", "gpu_memory_gb"]
LAST = ["ratio", "clipped", "sampling_gap", "engine_gap", "engine_lag", "lr", "grad_norm", "grad_noise", *MACHINE]
VALIDATION = "validation_"


@dataclass(frozen=True)
class Figure:
    """A drawn plot with its legend."""

    title: str
    legend: list[tuple[int, str]]  # colour, name
    svg: Markup
    note: str = ""


def points(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) by rising step; a step logged twice (a resumed run) counts as it was logged last."""
    found = {}
    for line in metrics:
        step, value = line.get("step"), line.get(key)
        if _is_number(step) and _is_number(value):
            found[float(step)] = float(value)
    return sorted(found.items())


def names(metrics: list[dict[str, Any]]) -> list[str]:
    """The curves of a stage, `validation_x` going with `x`; in the order of reading."""
    keys = dict.fromkeys(key for line in metrics for key, value in line.items() if _is_number(value))
    plain = list(dict.fromkeys(key.removeprefix(VALIDATION) for key in keys if key not in AXES))

    def rank(name: str) -> int:
        known = PART if name.startswith(PART) and name not in FIRST else name
        if known in FIRST:
            return FIRST.index(known)
        return 100 + LAST.index(known) if known in LAST else 50 if known == "loss" else 60

    return sorted(plain, key=rank)


def titled(name: str) -> str:
    """A curve's name in words.

    >>> titled("grad_norm"), titled("reward_rouge"), titled("validation_loss")
    ('gradient norm', 'reward: rouge', 'validation loss')
    """
    if name in NAMES:
        return NAMES[name]
    return f"reward: {name.removeprefix(PART)}" if name.startswith(PART) else name.replace("_", " ")


def figures(metrics: list[dict[str, Any]]) -> list[Figure]:
    """The curves of one training stage."""
    out = []
    apart = list(dict.fromkeys(str(line["policy"]) for line in metrics if "policy" in line))
    for name in names(metrics):
        if apart:
            out += _of_policies(metrics, name, apart)
            continue
        series, note = [], ""
        if train := points(metrics, name):
            series.append(Series(name, train, 1))
        if validation := points(metrics, VALIDATION + name):
            best = best_validation(metrics, name)
            series.append(Series(f"validation {name}", validation, 2, dots=True, best=best))
            if best:
                note = f"best validation {name} {compact(best[1])} at step {compact(int(best[0]))}"
        whole = [line for line in metrics if _is_number(line.get(f"whole_validation_{name}"))]
        if whole:
            said = f"on all rows, at step {whole[-1].get('step')}: {compact(whole[-1][f'whole_validation_{name}'])}"
            note = "; ".join(filter(None, [note, said]))
        if lost := sum(1 for line in metrics if name in line and not _is_number(line[name])):
            note = f"{note}; " * bool(note) + f"{lost} values are not finite and not drawn"
        if series:
            legend = [(s.colour, s.name) for s in series] if len(series) > 1 else []
            title = titled(name)
            out.append(Figure(title, legend, lines(series, f"{title} over steps"), note))
    return out


def _of_policies(metrics: list[dict[str, Any]], name: str, apart: list[str]) -> list[Figure]:
    """A curve of policies trained apart: `policy` is ROUND.POLICY, and a policy of each round has the same colour."""
    series = []
    for policy in apart:
        if found := points([line for line in metrics if str(line.get("policy")) == policy], name):
            number = policy.rpartition(".")[2]
            series.append(Series(f"policy {policy}", found, int(number) if number.isdecimal() else 1))
    if not series:
        return []
    legend = {s.colour: f"policy {s.colour}" for s in series}
    title = titled(name)
    return [Figure(title, sorted(legend.items()), lines(series, f"{title} over steps"), "rounds one after another")]


def overlaid(runs: list[tuple[str, list[dict[str, Any]]]]) -> list[Figure]:
    """The curves of the same stage in several runs: solid for validation where there is one, else training."""
    out = []
    for name in dict.fromkeys(name for _, metrics in runs for name in names(metrics)):
        validated = any(points(metrics, VALIDATION + name) for _, metrics in runs)
        key = VALIDATION + name if validated else name
        series = [Series(run, p, i, dots=validated) for i, (run, m) in enumerate(runs, 1) if (p := points(m, key))]
        if series:
            title = titled(key)
            out.append(Figure(title, [(s.colour, s.name) for s in series], lines(series, f"{title} over steps")))
    return out


def best_validation(metrics: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The last validation that was written as the best one (each new best is marked when it happens)."""
    key = VALIDATION + name
    marked = [line for line in metrics if line.get("best") is True and _is_number(line.get(key)) and "step" in line]
    return (float(marked[-1]["step"]), float(marked[-1][key])) if marked else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
