"""Is WARP's reward–KL front above RLOO's and REINFORCE's? A study on film reviews, several seeds, judged twice.

    python benchmarks/warp_front.py --reviews FOLDER --out FOLDER [--seeds 3] [--first 1] [--steps 120]

FOLDER of reviews holds train.jsonl and test.jsonl with the columns text and sentiment (positive, negative). A small base
is pretrained on the training texts, and two reward models of its shape are trained, each on its half of them. They
start from random weights: attention that has learnt to predict the next word looks at the last few, and on so few
texts the reward model learns them by heart before it looks further (74 % of held-out pairs against 86 %). REINFORCE,
RLOO and WARP then start from the base, with the same number of sampled completions (WARP: of each policy a quarter of
the steps, two rounds of two), RLOO a second time with a fifth of the KL's weight, to reach as far as WARP does. The
first reward model is what they learn from, the second one has a say only here.
Several processes may share the seeds (--first 2 --seeds 1); a last call with all of them makes the table.

Points of a front: for REINFORCE and RLOO the run itself at a quarter, half and all of its steps («run»), and the
interpolations of its end towards the start («liti»); for WARP the interpolations of its last merge. KL is exact, in nats
an answer. Fronts of the seeds are read off at levels of KL: a quarter, half and three quarters of the largest KL that every
front reaches, and of those that go further at two more, so that nothing is extrapolated. What is finished is not
computed again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import temper.stages  # noqa: F401 (recipes name them)
from temper import pipeline
from temper import recipe as recipes
from temper.engine import checkpoint
from temper.models.scores import Policy
from temper.runfolder import read_json, read_sealed, write_atomic, write_json, write_sealed
from temper.stages.front import front, reopened

LITI = [0.25, 0.5, 0.75, 1.0]
PROMPTS, WORDS, READ = 160, 6, 90  # held-out openings; words of an opening, and of what a reward model is trained on
QUICK = {"batch_size": 16, "lr": 3e-4, "precision": "bf16", "decoding": {"max_new_tokens": 32}}
POLICY = {"model": "base", "data": "openings", "reward": ["model"], **QUICK}


def recipe_of(files: Path, steps: int, models: dict[str, str], names: Sequence[str], **more: Any) -> dict[str, Any]:
    """Some of the stages; `models`: made already, by name."""

    def data(name: str, **fields: Any) -> dict[str, Any]:
        columns = {"text": "{text}", "label": "{label}"} if name != "openings" else {"prompt": "{opening}"}
        return {"stage": "data", "source": str(files / f"{name}.jsonl"), **columns, "near_leaks": False, **fields}

    def judge(half: str) -> dict[str, Any]:
        return {
            "stage": "reward", "model": models.get("untrained"), "data": half, "positive": "positive",
            "longer": "cut", "epochs": 2, "pairs": 2200, "batch_size": 8, "lr": 2e-4, "precision": "bf16",
        }  # fmt: skip

    base, kl = models.get("base_lm", "base_lm"), {"beta": 0.1, "place": "reward"}
    policy = {**POLICY, "reward_model": models.get("reward", "reward"), "kl": kl}
    one = {"stage": "rl", **policy, "max_steps": steps, "checkpoint_every": steps // 4, "keep_checkpoints": 5}
    stages: dict[str, Any] = {
        "corpus": data("corpus", label=None, validation=50, test=0),
        "base_lm": {
            "stage": "pretrain", "data": "corpus", "precision": "bf16", "max_steps": 1200, "lr": 2e-3, "row_tokens": 192,
            "batch_size": 8, "shape": {"vocabulary": 8000, "hidden": 256, "layers": 2, "heads": 4, "context": 192},
        },
        "half_a": data("half_a", validation=200, test=600),
        "half_b": data("half_b", validation=200, test=600),
        "reward": judge("half_a"),
        "second_reward": judge("half_b"),
        "openings": data("openings", validation=str(files / "held_out.jsonl"), test=0, format={"separator": " "}),
        "reinforce": {**one, "algorithm": "reinforce", "completions": 1, "batch_size": 64},
        "rloo": {**one, "algorithm": "rloo", "completions": 4},
        "rloo_far": {**one, "algorithm": "rloo", "completions": 4, "kl": {**kl, "beta": 0.02}},
        "warp": {
            "stage": "warp", **policy, "algorithm": "rloo", "completions": 4, "max_steps": steps // 4, "rounds": 2,
            "policies": 2, "liti": 0.5, "ema": 0.1, "front": [],
        },
    }  # fmt: skip
    wanted = {n: s for n, s in stages.items() if n in names}
    return {"name": "warp-front", "model": base, **more, "stages": wanted}


def prepare(reviews: Path, files: Path) -> None:
    """The texts without line breaks, in two halves and as openings; test reviews give the openings alone."""
    files.mkdir(parents=True, exist_ok=True)

    def rows(name: str) -> list[dict[str, Any]]:
        with open(reviews / f"{name}.jsonl", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        order = np.random.default_rng(1).permutation(len(found))
        plain = [" ".join(re.sub(r"<br\s*/?>", " ", found[i]["text"]).split()) for i in order]
        return [{"text": t, "label": found[i]["sentiment"]} for t, i in zip(plain, order, strict=True)]

    def write(name: str, out: list[dict[str, Any]]) -> None:
        write_atomic(files / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in out))

    train, test = rows("train"), rows("test")
    write("corpus", [{"text": r["text"]} for r in train])
    short = [{**r, "text": " ".join(r["text"].split()[:READ])} for r in train]
    write("half_a", short[: len(short) // 2])
    write("half_b", short[len(short) // 2 :])
    openings = list(dict.fromkeys(" ".join(r["text"].split()[:WORDS]) for r in test))
    write("openings", [{"opening": o} for o in openings[:-PROMPTS]])
    write("held_out", [{"opening": o} for o in openings[-PROMPTS:]])


def untrained(base: Path, folder: Path) -> Path:
    """A model of the base's shape with random weights, and its tokenizer."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(folder)
    return folder


def run_stages(spec: Path, folder: Path, names: Sequence[str]) -> None:
    """Bring some stages of a recipe to their results."""
    pipeline.run(recipes.load(spec), folder, choice=pipeline.Choice(only=names))


def trained(recipe: recipes.Recipe, run: Path, name: str, folder: Path, start: Path, steps: int) -> dict[int, Path]:
    """One policy's weights at a quarter, half and all of its steps, as folders."""
    out = {n: folder / f"at-{n}" for n in (steps // 4, steps // 2, steps)}
    if not all((f / "done").is_file() for f in out.values()):
        recipe.stages[name].train(reopened(recipe, run, name, folder))  # type: ignore[attr-defined]
        for n, target in out.items():
            policy = Policy(AutoModelForCausalLM.from_pretrained(start))
            checkpoint.read_weights(folder / "checkpoints" / f"step-{n}", policy)
            policy.hf.save_pretrained(target)
            AutoTokenizer.from_pretrained(start).save_pretrained(target)
            (target / "done").touch()
    return out


def measured(recipe: recipes.Recipe, run: Path, name: str, ends: dict[str, Path], start: Path, out: Path) -> list[Any]:
    """Points {label, kl, reward, second} between the start and each end, judged by both reward models."""
    found: list[Any] = []
    for label, end in ends.items():
        etas = LITI if label == "liti" else [1.0]
        judged = []
        for judge in ("reward_model", "second_reward_model"):
            stage: Any = recipe.stages[name]
            if judge == "second_reward_model":
                stage = stage.model_copy(update={"reward_model": recipe.raw["second"]})
            job = reopened(recipe, run, name, out / f"{name}-{label}-{judge}")
            judged.append(front(job, stage, start, end, etas, prompts=PROMPTS)["points"])
        for a, b in zip(*judged, strict=True):
            shown = a["label"] if label == "liti" else label
            found.append(
                {"kind": label.split("-")[0], "label": shown, "kl": a["x"], "reward": a["y"], "second": b["y"]}
            )
    return found


def study(args: argparse.Namespace) -> dict[str, list[list[Any]]]:
    """Fronts by name, one a seed."""
    files, shared = args.out / "texts", args.out / "shared"
    if not (files / "held_out.jsonl").is_file():
        prepare(args.reviews, files)
    models = {name: getattr(args, name) for name in ("base_lm", "reward", "second_reward") if getattr(args, name)}

    def make(names: Sequence[str], *, needs: Sequence[str]) -> None:
        """Bring some models to be that are not given, with the stages they need."""
        missing = [n for n in names if n not in models]
        if any(not (shared / n / "model").is_dir() for n in missing):
            spec = args.out / f"{names[0]}.yaml"
            write_json(spec, recipe_of(files, args.steps, models, [*needs, *missing]))
            run_stages(spec, shared, missing)
        models.update({n: str(shared / n / "model") for n in missing})

    make(["base_lm"], needs=["corpus"])
    models["untrained"] = str(untrained(Path(models["base_lm"]), args.out / "untrained"))
    make(["reward", "second_reward"], needs=["half_a", "half_b"])
    start = Path(models["base_lm"])
    fronts: dict[str, list[list[Any]]] = {"reinforce": [], "rloo": [], "rloo_far": [], "warp": []}
    for seed in range(args.first, args.first + args.seeds):
        run = args.out / f"seed-{seed}"
        run.mkdir(exist_ok=True)
        spec = run / "study.yaml"
        write_json(spec, recipe_of(files, args.steps, models, ["openings", *fronts], seed=seed))
        run_stages(spec, run / "run", ["openings"])
        recipe = recipes.load(spec)
        recipe.raw["second"] = models["second_reward"]
        for name in ("reinforce", "rloo", "rloo_far"):
            kept = run / f"{name}.json"
            if (found := read_sealed(kept)) is None:
                at = trained(recipe, run / "run", name, run / name, start, args.steps)
                ends = {f"run-{n}": folder for n, folder in at.items()} | {"liti": at[args.steps]}
                found = {"points": measured(recipe, run / "run", name, ends, start, run / "points")}
                write_sealed(kept, found)
            fronts[name].append(found["points"])
        kept = run / "warp.json"
        if (found := read_sealed(kept)) is None:
            run_stages(spec, run / "run", ["warp"])
            ends = {"liti": run / "run" / "warp" / "merged"}
            found = {"points": measured(recipe, run / "run", "warp", ends, start, run / "points")}
            write_sealed(kept, found)
        fronts["warp"].append(found["points"])
    return fronts


def at_levels(points: list[Any], kind: str, what: str, levels: np.ndarray) -> np.ndarray:
    """A front's reward at levels of KL, straight between its points; nan beyond the last. The start stands at KL 0."""
    chosen = sorted((p["kl"]["value"], p[what]["value"]) for p in points if p["kind"] in ("start", kind))
    x, y = zip(*chosen, strict=True)
    return np.interp(levels, x, y, right=np.nan)


def table(fronts: dict[str, list[list[Any]]], starts: dict[str, float]) -> dict[str, Any]:
    """Rewards at levels of KL: mean and Student's 95 % interval over seeds, and the differences of WARP from each."""
    from scipy.stats import t

    lines = [(name, kind) for name in fronts for kind in (("liti",) if name == "warp" else ("run", "liti"))]

    def ends(names: Sequence[str]) -> float:
        """The largest KL that all fronts of these names reach, with every seed."""
        kinds = [(n, k) for n, k in lines if n in names]
        return min(max(p["kl"]["value"] for p in ps if p["kind"] == k) for n, k in kinds for ps in fronts[n])

    reach, far = ends(list(fronts)), ends(["warp", "rloo_far"])
    levels = np.array([0.25 * reach, 0.5 * reach, 0.75 * reach, *(x * far for x in (0.5, 0.75) if x * far > reach)])
    out: dict[str, Any] = {"levels": levels.tolist(), "rows": []}

    def zeroed(points: list[Any], what: str) -> list[Any]:
        return [*points, {"kind": "start", "kl": {"value": 0.0}, what: {"value": starts[what]}}]

    for what in ("reward", "second"):
        at = {
            (name, kind): np.stack([at_levels(zeroed(points, what), kind, what, levels) for points in fronts[name]])
            for name, kind in lines
        }

        def over_seeds(values: np.ndarray) -> list[list[float | None]]:
            n = len(values)
            half = t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5 if n > 1 else np.full(len(levels), np.nan)
            three = np.stack([values.mean(0), values.mean(0) - half, values.mean(0) + half], 1)
            return [[None if np.isnan(v) else float(v) for v in one] for one in three]

        for key, values in at.items():
            whole = np.linspace(0, levels[-1], 61)
            shown = [at_levels(zeroed(points, what), key[1], what, whole) for points in fronts[key[0]]]
            curve = [None if np.isnan(v) else float(v) for v in np.mean(shown, 0)]
            out["rows"].append({"judge": what, "front": " ".join(key), "at": over_seeds(values), "curve": curve})
        for key, values in list(at.items())[:-1]:
            difference = over_seeds(at["warp", "liti"] - values)
            out["rows"].append({"judge": what, "front": f"warp − {' '.join(key)}", "at": difference})
    return out


COLOUR = {"reinforce": "#c2410c", "rloo": "#1d4ed8", "rloo_far": "#7c3aed", "warp": "#047857"}
CALLED = {"rloo_far": "rloo β 0.02"}


def plot(result: dict[str, Any]) -> str:
    """The mean fronts as an SVG of two panels, one a judge; bars are the intervals over seeds at the levels."""
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 340" font-family="sans-serif" font-size="12">']
    out.append('<rect width="760" height="340" fill="white"/>')
    levels = result["levels"]
    grid = np.linspace(0, levels[-1], 61)
    for panel, (what, title) in enumerate({"reward": "learnt from", "second": "second judge"}.items()):
        rows = [r for r in result["rows"] if r["judge"] == what and "−" not in r["front"]]
        shown = [v for r in rows for three in [*r["at"], r["curve"]] for v in three if v is not None]
        low, high, left = min(shown), max(shown), 60 + 370 * panel

        def at(kl: float, reward: float, left: int = left, low: float = low, high: float = high) -> tuple[float, float]:
            return left + 290 * kl / grid[-1], 270 - 220 * (reward - low) / (high - low)

        out.append(f'<text x="{left}" y="30" font-weight="bold">reward, {title}</text>')
        out.append(f'<path d="M{left} 50V270H{left + 290}" fill="none" stroke="#555"/>')
        for value in np.linspace(low, high, 4):
            out.append(f'<text x="{left - 6}" y="{at(0, value)[1] + 4:.0f}" text-anchor="end">{value:.1f}</text>')
        for value in (0.0, *levels):
            out.append(f'<text x="{at(value, low)[0]:.0f}" y="286" text-anchor="middle">{value:.1f}</text>')
        out.append(f'<text x="{left + 145}" y="304" text-anchor="middle">KL to the start, nats an answer</text>')
        for k, row in enumerate(rows):
            name, kind = row["front"].split()
            points = " ".join(
                "{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(grid, row["curve"], strict=True) if y is not None
            )
            line = f'stroke="{COLOUR[name]}" stroke-width="2"' + (' stroke-dasharray="5 4"' if kind == "run" else "")
            out.append(f'<polyline points="{points}" fill="none" {line}/>')
            for level, (_, bottom, top) in zip(levels, row["at"], strict=True):
                if bottom is not None:
                    (x, y), end = at(level, bottom), at(level, top)[1]
                    out.append(f'<path d="M{x + 3 * k - 9:.1f} {y:.1f}V{end:.1f}" stroke="{COLOUR[name]}"/>')
            if not panel:
                x, y = 20 + 190 * (k % 4), 320 + 15 * (k // 4)
                out.append(f'<path d="M{x} {y - 4}h24" fill="none" {line}/>')
                out.append(f'<text x="{x + 28}" y="{y}">{CALLED.get(name, name)}, {kind}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--steps", type=int, default=120)
    for name in ("base_lm", "reward", "second_reward"):
        parser.add_argument(f"--{name.replace('_', '-')}", help="a folder with this model, made before")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    fronts = study(args)
    if not args.seeds or args.first > 1:
        return  # a part of the work
    starts = args.out / "start.json"
    if (start := read_sealed(starts)) is None:
        recipe = recipes.load(args.out / "seed-1" / "study.yaml")
        spec = read_json(args.out / "seed-1" / "study.yaml")
        models, base, second = (
            spec["stages"]["rloo"],
            Path(spec["model"]),
            args.second_reward or str(args.out / "shared/second_reward/model"),
        )
        start = {}
        for what, judge in (("reward", models["reward_model"]), ("second", second)):
            stage: Any = recipe.stages["rloo"]
            job = reopened(recipe, args.out / "seed-1/run", "rloo", args.out / f"start-{what}")
            point = front(job, stage.model_copy(update={"reward_model": judge}), base, base, [0.0], prompts=PROMPTS)
            start[what] = point["points"][0]["y"]["value"]
        write_sealed(starts, start)
    result = {"start": start, "fronts": fronts, **table(fronts, start)}
    write_json(args.out / "result.json", result)
    write_atomic(args.out / "front.svg", plot(result))
    print(f"\nstart: reward {start['reward']:.2f}, second judge {start['second']:.2f}")
    print("KL, nats an answer: " + ", ".join(f"{level:.2f}" for level in result["levels"]))
    for row in result["rows"]:
        cells = "  ".join(f"{v:+.2f} ({a:+.2f} to {b:+.2f})" if v is not None else "–" for v, a, b in row["at"])
        print(f"{row['judge']:7} {row['front']:22} {cells}")


if __name__ == "__main__":
    main()
