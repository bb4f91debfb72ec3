"""Several processes train what one does: losses, gradients and weights, under DDP and FSDP2; checkpoints go from any number of
them to any other; and whatever happens to one, all of them end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from temper.engine.processes import dealt
from temper.trees import chain, rows_of

TINY = "{vocabulary: 600, hidden: 32, layers: 2, heads: 2, context: 320}"
SGD = "batch_size: 8, max_steps: 4, lr: 1.0e-2, optimizer: sgd, samples: 1"
RECIPE = f"""
name: several
model: tiny
stages:
  corpus: {{stage: data, source: mini:uk-corpus, text: "{{text}}", take: 120, validation: 20, test: 0}}
  tiny: {{stage: pretrain, data: corpus, shape: {TINY}, batch_size: 8, max_steps: 4, lr: 3.0e-3}}
  news: {{stage: data, source: mini:uk-news, prompt: "{{title}}", completion: "{{summary}}", take: 80, validation: 11, test: 0}}
  liked: {{stage: data, source: mini:en-advice, prompt: "{{prompt}}\\nAdvice:", chosen: "{{chosen}}", rejected: "{{rejected}}", take: 60, validation: 7, test: 0}}
"""
STAGES = {
    "whole": f"{{stage: sft, data: news, {SGD}}}",
    "lora": f"{{stage: sft, data: news, adapter: {{method: lora, r: 4}}, merge: true, {SGD}}}",
    "soft": f"{{stage: sft, data: news, adapter: {{method: lora+prompt, r: 4, tokens: 3}}, {SGD}}}",
    "recomputed": f"{{stage: sft, data: news, activation_checkpointing: true, micro_tokens: 256, {SGD}}}",
    "dpo": "{stage: preference, data: liked, adapter: {method: lora, r: 4}, batch_size: 6, max_steps: 3, lr: 1.0e-2, optimizer: sgd}",
    "aot": "{stage: preference, data: liked, loss: aot, batch_size: 6, micro_tokens: 300, max_steps: 3, lr: 1.0e-3, optimizer: sgd}",
    "grpo": "{stage: rl, data: news, adapter: {method: lora, r: 4}, batch_size: 3, completions: 4, max_steps: 3, lr: 1.0e-1, optimizer: sgd, reward: [{length: {target: 9}}], kl: {beta: 0.05}, decoding: {max_new_tokens: 12, temperature: 1.0}}",
    "whole_grpo": "{stage: rl, data: news, batch_size: 3, completions: 4, max_steps: 2, lr: 1.0e-2, optimizer: sgd, reward: [{length: {target: 9}}], kl: {beta: 0.05}, rollout_steps: 2, decoding: {max_new_tokens: 12, temperature: 1.0}}",
}  # fmt: skip
FAR = 1e-6  # relative, of losses, norms and weights


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "temper", "run", *words]


def environment() -> dict[str, str]:
    # One thread a process and passive waiting: they share two cores with the other tests.
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(*words: str, code: int = 0, timeout: float = 240) -> str:
    done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages by one process."""
    folder = tmp_path_factory.mktemp("several")
    recipe = RECIPE + "".join(f"  {name}: {stage}\n" for name, stage in STAGES.items())
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    run(str(folder / "recipe.yaml"), "--out", str(folder / "alone"), "-q")
    return folder


def lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, stage: str) -> dict[str, Any]:
    found = {}
    for file in sorted((folder / stage).rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            found |= {f"{file.parent.name}/{name}": x for name, x in load_file(file).items()}
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(alone: Path, parallel: str) -> None:
    out = alone / parallel
    subprocess.run(["cp", "-r", alone / "alone", out], check=True)
    for stage in STAGES:  # the base is the same to the bit: AdamW would magnify rounding
        subprocess.run(["rm", "-r", out / stage], check=True)
    launch = f"launch={{processes: 2, parallel: {parallel}}}"
    said = run(str(alone / "recipe.yaml"), "--out", str(out), "--set", launch)
    assert "defect" not in said and said.count("report: ") == 1
    for stage in STAGES:
        one, two = lines(alone / "alone", stage), lines(out, stage)
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for a, b in zip(one, two, strict=True):
            for name in a.keys() & {"loss", "grad_norm", "validation_loss", "reward", "kl", "margin"}:
                assert b[name] == pytest.approx(a[name], rel=20 * FAR, abs=20 * FAR), (stage, a["step"], name)
            assert a.get("tokens") == b.get("tokens")
        mine, theirs = weights(alone / "alone", stage), weights(out, stage)
        assert mine.keys() == theirs.keys() and mine
        start = weights(alone / "alone", "tiny")
        for name, x in mine.items():
            assert float((theirs[name] - x).norm() / x.norm().clamp(min=1e-9)) < FAR, (stage, name)
        whole = [n for n, x in mine.items() if n in start]
        assert any(bool((start[n] != mine[n]).any()) for n in whole) or not whole, f"{stage} has trained nothing"


MINI = {  # the recipe's stages that train together, and what makes them comparable: SGD in float32, few steps
    "detox-summarization": {"sft": ["max_steps=8", "lr=0.1"], "grpo": ["max_steps=3", "lr=0.3"]},
    "preference": {"dpo": ["max_steps=6", "lr=0.1"]},
}  # fmt: skip


@pytest.mark.claims
@pytest.mark.parametrize("recipe", list(MINI))
def test_mini_recipes_train_alike_on_two_processes(tmp_path: Path, recipe: str) -> None:
    """Their data, models, batches and rollouts; the base is pretrained for fewer steps."""
    stages = MINI[recipe]
    sets = ["tiny.max_steps=60", *(f"{name}.{more}" for name, own in stages.items() for more in (*own, "optimizer=sgd", "precision=float32"))]
    for out, launch in (("one", []), ("ddp", ["launch={processes: 2, parallel: ddp}"]), ("fsdp", ["launch={processes: 2, parallel: fsdp}"])):
        for name in stages:  # each from the very weights that one process started from
            if out != "one":
                subprocess.run(["cp", "-r", tmp_path / "one", tmp_path / f"{out}-{name}"], check=True)
                subprocess.run(["rm", "-r", tmp_path / f"{out}-{name}" / name], check=True)
            folder = tmp_path / ("one" if out == "one" else f"{out}-{name}")
            said = run(recipe, "--profile", "mini", "--stages", name, "--out", str(folder), "--set", *sets, *launch, timeout=900)
            assert "defect" not in said
            one, two = lines(tmp_path / "one", name), lines(folder, name)
            assert [a["loss"] for a in one if "loss" in a] == pytest.approx([b["loss"] for b in two if "loss" in b], rel=1e-4, abs=1e-6)
            mine, theirs = weights(tmp_path / "one", name), weights(folder, name)
            assert mine.keys() == theirs.keys()
            far = {n: float((theirs[n] - x).norm() / x.norm().clamp(min=1e-9)) for n, x in mine.items()}
            changes = max(v for n, v in far.items() if n.startswith("adapter/"))
            model = max(v for n, v in far.items() if n.startswith("model/"))
            print(f"{recipe}, {name}, {out}: weights differ by at most {model:.1e} of their norm, the adapter's by {changes:.1e}")
            assert model < FAR, max(far, key=lambda n: far[n])
            # An adapter begins at nothing: it is all gradients, whose rounding no larger weight hides. One process that
            # cuts its micro-batches otherwise (dpo, 700 tokens) is 3.2e-6 away from itself.
            assert changes < 10 * FAR, max(far, key=lambda n: far[n])


def test_trees_are_dealt_out_by_tokens() -> None:
    trees = [chain(list(range(n)), [1.0] * n, str(n)) for n in (50, 30, 30, 20, 20, 10)]
    hands = dealt(rows_of(trees, 64, 128), 2, 64, 128)
    sizes = [sum(row.tokens for row in hand) for hand in hands]
    assert sizes == [80, 80]
    assert sorted(t.origin for hand in hands for row in hand for t in row.trees) == sorted(t.origin for t in trees)


# What happens to one of them


LONG = RECIPE.split("  news:")[0].replace("max_steps: 4", "max_steps: 4000, checkpoint_every: 10").replace("3.0e-3", "1.0e-3, optimizer: sgd")


class Launched:
    """A run of two processes that would take long."""

    def __init__(self, folder: Path, out: str = "run") -> None:
        self.folder, self.out = folder, folder / out
        (folder / "long.yaml").write_text(LONG, encoding="utf-8")
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
        words = command(str(folder / "long.yaml"), "--out", str(self.out), "--set", "launch.processes=2")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        self.ranks: list[psutil.Process] = []

    @property
    def checkpoints(self) -> list[int]:
        found = (self.out / "tiny.partial" / "checkpoints").glob("step-*")
        return sorted(int(p.name.partition("-")[2]) for p in found)

    def trained(self, beyond: int = 0) -> None:
        """Wait until it has trained for a while."""
        for _ in range(600):
            if self.checkpoints and self.checkpoints[-1] > beyond:
                break
            assert self.process.poll() is None, self.said
            time.sleep(0.1)
        self.ranks = sorted(psutil.Process(self.process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
        assert len(self.ranks) == 2

    @property
    def said(self) -> str:
        return self.log.read_text()

    def left_alone(self) -> bool:
        """Whether processes without a launcher are gone within a minute."""
        for _ in range(600):
            found = [p for p in psutil.process_iter(["cmdline"]) if str(self.out) in (p.info["cmdline"] or [])]
            if not found:
                return True
            time.sleep(0.1)
        return False

    def ended(self) -> int:
        """Its exit code, within a minute; nothing of it is left."""
        began = time.monotonic()
        code = self.process.wait(timeout=60)
        assert time.monotonic() - began < 60
        assert not [p for p in self.ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return code


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    found = Launched(tmp_path)
    yield found
    for process in [*found.ranks, found.process]:
        if psutil.pid_exists(process.pid):
            process.kill()
    found.process.wait()


@pytest.mark.claims
def test_one_that_is_killed_ends_all_and_they_go_on(launched: Launched) -> None:
    launched.trained()
    launched.ranks[1].kill()
    assert launched.ended() == 1
    assert "process 1 was killed" in launched.said and "Traceback" not in launched.said
    again, reached = Launched(launched.folder), launched.checkpoints[-1]
    launched.process, launched.ranks = again.process, []
    again.trained(beyond=reached)
    launched.ranks = again.ranks
    assert re.search(rf"goes on from step {reached}\b", again.said)
    again.process.send_signal(signal.SIGTERM)  # pre-emption: what was done is saved
    assert again.ended() == 143
    step = int(re.findall(r"goes on from step (\d+) of stage tiny", again.said)[-1])
    assert step == again.checkpoints[-1] and again.said.count("stopped by SIGTERM") == 1


@pytest.mark.claims  # a minute: the launcher gives a process half of one to end by itself
def test_one_that_is_silent_ends_all(launched: Launched) -> None:
    launched.trained()
    launched.ranks[1].suspend()
    assert launched.ended() == 1
    assert "process 1 has given no sign of life" in launched.said


@pytest.mark.claims
def test_twenty_kills_at_random(tmp_path: Path) -> None:
    """Each ends all within a minute, leaves nothing, and the next start goes on from what was saved."""
    draw, reached = random.Random(0), 0
    for _ in range(20):
        one = Launched(tmp_path)
        try:
            time.sleep(draw.uniform(3, 24))  # imports, the meeting, the data, training: whatever it is at
            ranks = psutil.Process(one.process.pid).children()
            if ranks:
                one.ranks = ranks
                draw.choice(ranks).kill()
                assert one.ended() == 1, one.said
            else:  # the launcher, which may be about to start them: they end by themselves
                one.process.kill()
                one.process.wait()
                assert one.left_alone()
            assert "Traceback" not in one.said, one.said
            # not the sentence at the end of a process that had time to save
            if found := re.search(r"^goes on from step (\d+)", one.said, re.M):
                assert int(found[1]) == reached
            assert not one.checkpoints or one.checkpoints[-1] >= reached
            reached = one.checkpoints[-1] if one.checkpoints else 0
        finally:
            for process in [*one.ranks, one.process]:
                if psutil.pid_exists(process.pid):
                    process.kill()
    assert reached > 0


def test_an_error_of_one_is_told_by_name(tmp_path: Path) -> None:
    """A reward of one's own that fails where it meets one prompt: only the process that has that prompt meets it."""
    (tmp_path / "own.py").write_text(
        "import os\n\ndef reward(prompts, completions, **columns):\n"
        "    if os.environ.get('RANK') == '1':\n        raise ValueError('not this one')\n    return [1.0] * len(completions)\n"
    )
    stage = "{stage: rl, data: news, batch_size: 4, completions: 2, max_steps: 2, reward: ['own:reward'], decoding: {max_new_tokens: 4, temperature: 1.0}}"
    (tmp_path / "r.yaml").write_text(RECIPE + f"  rl: {stage}\n", encoding="utf-8")
    began = time.monotonic()
    said = run(str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--set", "launch.processes=2", code=1)
    assert "process 1: " in said and "not this one" in said and "Traceback" not in said
    assert time.monotonic() - began < 90


@pytest.mark.claims
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_goes_on_on_one_and_on_two(alone: Path, tmp_path: Path, parallel: str) -> None:
    """SIGTERM in the middle; then on one process, on two, and spread otherwise: the weights of an undisturbed run."""
    recipe = LONG.replace("max_steps: 4000, checkpoint_every: 10", "max_steps: 60, checkpoint_every: 5")
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    one = tmp_path / "one"
    run(str(tmp_path / "r.yaml"), "--out", str(one), "-q")
    halves = command(str(tmp_path / "r.yaml"), "--out", str(tmp_path / "half"), "--set", f"launch={{processes: 2, parallel: {parallel}}}")
    process = subprocess.Popen(halves, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "half").glob("tiny.partial/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (143, 0)
    subprocess.run(["cp", "-r", tmp_path / "half", tmp_path / "other"], check=True)
    run(str(tmp_path / "r.yaml"), "--out", str(tmp_path / "half"), "-q")
    other = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
    run(str(tmp_path / "r.yaml"), "--out", str(tmp_path / "other"), "-q", "--set", f"launch={{processes: 2, parallel: {other}}}")
    for name, x in weights(one, "tiny").items():
        for way in ("half", "other"):
            assert float((weights(tmp_path / way, "tiny")[name] - x).norm() / x.norm()) < FAR, (way, name)


def test_processes_with_other_data_are_told(tmp_path: Path) -> None:
    """Each process is started by hand with a recipe of its own, as on two machines whose files differ."""
    for rank in range(2):
        text = RECIPE.split("  news:")[0].replace("max_steps: 4", f"max_steps: {4 + rank}")
        (tmp_path / f"{rank}.yaml").write_text(text, encoding="utf-8")
    port = 20000 + os.getpid() % 20000
    both = []
    for rank in range(2):
        env = environment() | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = command(str(tmp_path / f"{rank}.yaml"), "--out", str(tmp_path / "run"))
        both.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [p.communicate(timeout=120)[0] for p in both]
    assert all(p.returncode == 1 for p in both)
    assert "process 1 reads another recipe, other data or another model than process 0" in said[0]
