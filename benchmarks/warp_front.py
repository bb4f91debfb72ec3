"""Is WARP's reward–KL front above RLOO's and REINFORCE's? A study on film reviews, several seeds, judged twice.

    python benchmarks/warp_front.py --reviews FOLDER --out FOLDER [--seeds 3] [--steps 120]

FOLDER of reviews holds train.jsonl and test.jsonl with the columns text and sentiment (positive, negative). A small base
is pretrained on the training texts, and two reward models are trained from it, each on its half of them. REINFORCE,
RLOO and WARP then start from the base, with the same number of sampled completions (WARP: of each policy a quarter of
the steps, two rounds of two). The first reward model is what they learn from, the second one has a say only here.

Points of a front: for REINFORCE and RLOO the run itself at a quarter, half and all of its steps («run»), and the
interpolations of its end towards the start («liti»); for WARP the interpolations of its last merge. KL is exact, in nats
an answer. Fronts of the seeds are read off at three levels of KL: a quarter, half and three quarters of the largest KL
that every front reaches, so that nothing is extrapolated. What is finished is not computed again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def recipe_of(files: Path, steps: int, models: dict[str, str]) -> dict[str, Any]:
    """The stages; `models`: made already, by name."""

    def data(name: str, **more: Any) -> dict[str, Any]:
        columns = {"text": "{text}", "label": "{label}"} if name != "openings" else {"prompt": "{opening}"}
        return {"stage": "data", "source": str(files / f"{name}.jsonl"), **columns, "near_leaks": False, **more}

    def judge(half: str) -> dict[str, Any]:
        return {
            "stage": "reward", "model": "base", "data": half, "positive": "positive", "longer": "cut", "epochs": 3,
            "pairs": 2200, "lr": 5e-4, "precision": "bf16",
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
        "warp": {
            "stage": "warp", **policy, "algorithm": "rloo", "completions": 4, "max_steps": steps // 4, "rounds": 2,
            "policies": 2, "liti": 0.5, "ema": 0.1, "front": [],
        },
    }  # fmt: skip
    unneeded = {*models, *(["corpus"] if "base_lm" in models else [])}
    return {"name": "warp-front", "model": base, "stages": {n: s for n, s in stages.items() if n not in unneeded}}


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
    spec = args.out / "shared.yaml"
    write_json(spec, recipe_of(files, args.steps, models))
    made = [n for n in ("reward", "second_reward", "base_lm") if n not in models]
    if made:
        run_stages(spec, shared, made)
    models = {n: models.get(n, str(shared / n / "model")) for n in ("base_lm", "reward", "second_reward")}
    start = Path(models["base_lm"])
    fronts: dict[str, list[list[Any]]] = {"reinforce": [], "rloo": [], "warp": []}
    for seed in range(1, args.seeds + 1):
        run = args.out / f"seed-{seed}"
        run.mkdir(exist_ok=True)
        spec = run / "study.yaml"
        whole = recipe_of(files, args.steps, models)
        whole["stages"] = {n: s for n, s in whole["stages"].items() if n in ("openings", "reinforce", "rloo", "warp")}
        write_json(spec, {**whole, "seed": seed})
        run_stages(spec, run / "run", ["openings"])
        recipe = recipes.load(spec)
        recipe.raw["second"] = models["second_reward"]
        for name in ("reinforce", "rloo"):
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
    """A front's reward at levels of KL, straight between its points; the start stands at KL 0."""
    chosen = sorted((p["kl"]["value"], p[what]["value"]) for p in points if p["kind"] in ("start", kind))
    x, y = zip(*chosen, strict=True)
    return np.interp(levels, x, y)


def table(fronts: dict[str, list[list[Any]]], starts: dict[str, float]) -> dict[str, Any]:
    """Rewards at levels of KL: mean and Student's 95 % interval over seeds, and the differences of WARP from each."""
    from scipy.stats import t

    lines = [("reinforce", "run"), ("reinforce", "liti"), ("rloo", "run"), ("rloo", "liti"), ("warp", "liti")]
    reach = min(
        max(p["kl"]["value"] for p in points if p["kind"] == kind) for name, kind in lines for points in fronts[name]
    )
    levels = reach * np.array([0.25, 0.5, 0.75])
    out: dict[str, Any] = {"levels": levels.tolist(), "rows": []}
    for what in ("reward", "second"):
        at = {
            (name, kind): np.stack([
                at_levels([*points, {"kind": "start", "kl": {"value": 0.0}, what: {"value": starts[what]}}], kind, what, levels)
                for points in fronts[name]
            ])
            for name, kind in lines
        }  # fmt: skip

        def over_seeds(values: np.ndarray) -> list[list[float]]:
            n = len(values)
            half = t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5 if n > 1 else np.full(len(levels), np.nan)
            return [[float(v) for v in three] for three in zip(values.mean(0), values.mean(0) - half, values.mean(0) + half, strict=True)]  # fmt: skip

        for key, values in at.items():
            out["rows"].append({"judge": what, "front": " ".join(key), "at": over_seeds(values)})
        for key, values in list(at.items())[:-1]:
            difference = over_seeds(at["warp", "liti"] - values)
            out["rows"].append({"judge": what, "front": f"warp − {' '.join(key)}", "at": difference})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    for name in ("base_lm", "reward", "second_reward"):
        parser.add_argument(f"--{name.replace('_', '-')}", help="a folder with this model, made before")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    fronts = study(args)
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
    print(f"\nstart: reward {start['reward']:.2f}, second judge {start['second']:.2f}")
    print("KL, nats an answer: " + ", ".join(f"{level:.2f}" for level in result["levels"]))
    for row in result["rows"]:
        cells = "  ".join(f"{v:+.2f} ({low:+.2f} to {high:+.2f})" for v, low, high in row["at"])
        print(f"{row['judge']:7} {row['front']:22} {cells}")


if __name__ == "__main__":
    main()
