"""Sweeps and fronts on the page: which points are joined, what is drawn where, what a broken or hostile file does.

`python tests/test_fronts.py FOLDER` writes the run below into FOLDER and builds its report, to look at.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from temper.report import build
from temper.report.contract import Front, Measured, Point, Trials
from temper.report.curves import figures
from temper.report.fronts import Curve, finding, parallel, scatter, trials_table, undominated
from temper.report.read import read_run

HOSTILE = "<script>alert(1)</script>"
REWARD, KL = "compare.rloo.reward_mean", "compare.rloo.kl"


def measured(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 200}


def point(x: float, y: float, label: str = "p") -> dict[str, Any]:
    return {"label": label, "setting": {}, "x": measured(x, 0.02 + x / 12), "y": measured(y, 0.08)}


def write_run(run: Path) -> Path:
    """A warp stage and a sweep of RLOO over the same two scores, a failed trial among them."""
    names = {"warp": "warp", "betas": "sweep"}
    manifest = {"schema": 1, "recipe": "review-sentiment", "profile": "mini", "seed": 20,
                "stages": [*({"name": n, "kind": k, "key": n} for n, k in names.items()),
                           {"name": "skipped", "kind": "evaluate", "key": None, "status": "skipped"}]}  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "recipe.yaml").write_text("name: review-sentiment\n")
    for name, kind in names.items():
        (run / name).mkdir(exist_ok=True)
        (run / name / "stage.json").write_text(json.dumps({"name": name, "kind": kind, "key": name, "seconds": 60.0}))
    etas = [0.1, 0.3, 0.5, 0.8, 1.0]
    warp = [point(1.9 * eta**1.6, 0.4 + 2.1 * eta**0.7, f"η = {eta}") for eta in etas]
    (run / "warp" / "front.json").write_text(json.dumps({"x": "kl", "y": "reward_mean", "points": warp}))
    trials, points = [], []
    grid = itertools.product([0.01, 0.03, 0.1, 0.3], [2, 4])
    for k, (beta, samples) in enumerate(grid):
        x, y = 0.09 / beta**0.65 / (1 + 0.2 * (samples == 4)), 2.2 - 1.9 * beta**0.35 + 0.15 * (samples == 4)
        settings = {"rloo.kl.beta": beta, "rloo.completions": samples}
        failed = k == 1
        trials.append({
            "number": k, "settings": settings, "values": {} if failed else {REWARD: measured(y, 0.09), KL: measured(x, 0.05)},
            "seconds": None if failed else 41.2 + k, "state": "failed" if failed else "done",
            "error": f"a loss that is no number {HOSTILE}" if failed else None, "folder": f"trials/{k}",
        })  # fmt: skip
        if not failed:
            points.append({**point(x, y, f"β {beta}, k {samples}"), "setting": settings})
    found = {"schema": 1, "search": "grid", "fields": ["rloo.kl.beta", "rloo.completions"], "best": 0, "front": [0, 3, 5, 7],
             "measures": [{"measure": REWARD, "metric": "reward_mean", "best": "highest"},
                          {"measure": KL, "metric": "kl", "best": "lowest"}], "trials": trials}  # fmt: skip
    (run / "betas" / "trials.json").write_text(json.dumps(found))
    (run / "betas" / "front.json").write_text(json.dumps({"x": "kl", "y": "reward_mean", "points": points}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("fronts") / "run")


def test_points_that_none_beats_are_joined_by_rising_x() -> None:
    places = [(3.0, 5.0), (1.0, 1.0), (2.0, 0.5), (2.0, 4.0), (3.0, 4.9), (0.5, 1.0)]
    points = [Point(x=Measured(value=x), y=Measured(value=y)) for x, y in places]
    kept = [(p.x.value, p.y.value) for p in undominated(points, False, True)]
    assert kept == [(0.5, 1.0), (2.0, 4.0), (3.0, 5.0)]  # less x, more y
    assert [(p.x.value, p.y.value) for p in undominated(points, True, True)] == [(3.0, 5.0)]
    twice = [points[0], points[0].model_copy()]
    assert len(undominated(twice, False, True)) == 2  # equal points do not beat one another


def test_fronts_over_the_same_scores_share_a_plot_and_others_do_not(run: Path, tmp_path: Path) -> None:
    page = build([run], tmp_path / "a").read_text("utf-8")
    section = page[page.index('<section id="fronts">') : page.index('<section id="sweeps">')]
    assert section.count("<svg") == 1
    assert re.findall(r'<span class="key"><i class="c(\d)"></i>(\w+)', section) == [("1", "warp"), ("2", "betas")]
    assert section.count("<circle") == 5 + 7 and section.count("<polyline") == 2
    other = write_run(tmp_path / "other")
    front = json.loads((other / "warp" / "front.json").read_text())
    (other / "warp" / "front.json").write_text(json.dumps(front | {"x": "length"}))
    page = build([other], tmp_path / "b").read_text("utf-8")
    section = page[page.index('<section id="fronts">') : page.index('<section id="sweeps">')]
    assert section.count("<svg") == 2 and section.count('class="key"') == 2, "each says of which stage it is"


def test_numbers_beside_the_axes_stay_within_the_drawing() -> None:
    """A character is at most 6.4 units wide; the drawing is 360 units wide."""
    measures = [{"measure": "e.g.kl", "metric": "kl", "best": "lowest"}]
    trials = [
        {"number": k, "settings": {"g.lr": -1.2345e-5 * (k + 1)}, "values": {"e.g.kl": measured(-1.2345e-5 * (k + 1), 0.0)},
         "seconds": 1.0, "state": "done", "error": None, "folder": None}
        for k in range(2)
    ]  # fmt: skip
    found = {"schema": 1, "search": "grid", "fields": ["g.lr"], "best": 0, "front": [], "measures": measures}
    drawn = str(parallel(Trials.model_validate({**found, "trials": trials}), "trials"))
    points = [{"label": f"{k}", "setting": {}, "x": measured(0.0125 * k, 0.0), "y": measured(k, 0.0)} for k in range(2)]
    front = Front.model_validate({"x": "kl", "y": "reward_mean", "points": points})
    drawn += str(scatter([Curve("w", 1, front.points, front.points)], "kl", "reward_mean"))
    texts = re.findall(r'<text[^>]*?x="([\d.]+)"[^>]*?>([^<]*)<', drawn)
    anchors = re.findall(r'<text[^>]*text-anchor="(\w+)"', drawn)
    assert len(texts) == len(anchors) > 10
    for (x, text), anchor in zip(texts, anchors, strict=True):
        if re.fullmatch(r"[−\d.e-]+", text):
            width = 6.4 * len(text)
            low = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
            assert low >= -1 and low + width <= 361, text


def test_what_is_drawn_lies_within_the_picture_and_in_order(run: Path, tmp_path: Path) -> None:
    page = build([run], tmp_path / "a").read_text("utf-8")
    for height, inside in re.findall(r'<svg viewBox="0 0 360 (\d+)"(.*?)</svg>', page, re.S):
        for x, y in re.findall(r'c?x="([\d.-]+)" c?y="([\d.-]+)"', inside):
            assert 0 <= float(x) <= 360 and 0 <= float(y) <= float(height)
    drawn = page[page.index('<section id="fronts">') :]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle class="c1" cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert (
        len(dots) == 5 and dots == sorted(dots) and [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)
    )


def test_the_table_of_trials_says_what_failed_and_what_is_best(run: Path, tmp_path: Path) -> None:
    stage = next(s for s in read_run(run).stages if s.trials)
    assert stage.trials is not None
    table = trials_table(stage.trials)
    assert [c.text for c in table.head] == [
        "trial", "rloo.kl.beta", "rloo.completions", f"{REWARD} ↑", f"{KL} ↓", "time", "outcome",
    ]  # fmt: skip
    assert [row[-1].text for row in table.rows][:4] == ["best", "failed", "done", "on the front"]
    assert [row[3].mark for row in table.rows].count("best") == 1 and table.rows[0][3].mark == "best"
    assert "7 of 8 trials done, 1 failed" in finding(stage.trials) and "rloo.kl.beta 0.01" in finding(stage.trials)
    assert read_run(run).problems == []
    built = build([run], tmp_path / "a")
    page, text = built.read_text("utf-8"), (tmp_path / "a" / "report.md").read_text("utf-8")
    assert HOSTILE not in page and "&lt;script&gt;" in page
    assert "rloo.kl.beta" in text and "reward\\_mean over kl" in text and HOSTILE not in text
    results = json.loads((tmp_path / "a" / "results.json").read_text("utf-8"))
    assert results["sweeps"]["betas"]["best"] == 0 and len(results["fronts"]["warp"]["points"]) == 5


def test_a_sweep_under_way_and_one_with_little_to_draw() -> None:
    one = {"number": 0, "settings": {"sft.lr": 0.1}, "values": {"e.m.loss": measured(1.0, 0.1)}}
    measures = [{"measure": "e.m.loss", "metric": "loss", "best": "lowest"}]
    found = Trials.model_validate({"fields": ["sft.lr"], "measures": measures, "trials": [one]})
    assert parallel(found, "t") is None and finding(found) == "1 of 1 trials done."
    mixed = [{**one, "number": n, "settings": {"sft.lr": v}} for n, v in enumerate([0.1, None, "auto", {"a": 1}])]
    drawn = parallel(Trials.model_validate({"fields": ["sft.lr"], "measures": measures, "trials": mixed}), "t")
    assert drawn is not None and all(text in drawn for text in ("0.1", "null", "auto"))
    assert Front.model_validate({"x": "kl", "y": "r"}).points == []


def test_policies_trained_apart_have_a_curve_each() -> None:
    """Two rounds of two policies: what the first policy of each round does has one colour, and no line joins rounds."""
    metrics = [
        {"policy": f"{r}.{m}", "step": 10 * (r - 1) + step, "reward": float(10 * r + m), "loss": 0.5}
        for r in (1, 2)
        for m in (1, 2)
        for step in (1, 5, 10)
    ]
    reward, loss = figures(metrics)
    assert (reward.title, loss.title) == ("reward", "loss") and reward.legend == [(1, "policy 1"), (2, "policy 2")]
    drawn = re.findall(r'<polyline class="line c(\d)" points="([^"]+)"', reward.svg)
    assert [colour for colour, _ in drawn] == ["1", "2", "1", "2"]
    assert all(len(points.split()) == 3 for _, points in drawn)
    heights = [{point.split(",")[1] for point in points.split()} for _, points in drawn]
    assert all(len(one) == 1 for one in heights) and len(set.union(*heights)) == 4


def test_a_broken_file_is_a_sentence(tmp_path: Path) -> None:
    broken = write_run(tmp_path / "run")
    (broken / "betas" / "trials.json").write_text('{"trials": [{"number": "first"}]}')
    (broken / "warp" / "front.json").write_text("{")
    page = build([broken]).read_text("utf-8")
    assert "trials.0.number" in page and "front.json cannot be read" in page


if __name__ == "__main__":
    print(build([write_run(Path(sys.argv[1]))]))
