"""Memory and time from shapes, against sums by hand, real tensors and what the kernel measures; and the job file for Slurm."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

import temper.stages  # noqa: F401  fills the registry
from temper import cli, plan, recipe
from temper.errors import ModelError
from temper.models.methods import Adapter
from temper.models.scores import Policy
from temper.scaling import footprint
from temper.scaling.footprint import Footprint, Setting
from temper.scaling.heap import Noted
from temper.scaling.machines import Machines, size_of
from temper.trees import chain, join

SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def make(vocabulary: int = 1000, **more: Any) -> Callable[[], Any]:
    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=False, **{**SHAPE, **more})
    return lambda: AutoModelForCausalLM.from_config(config)


def parameters(**more: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(**more)().parameters())


def held(parallel: Any = None, size: int = 1, *, of: Callable[[], Any] | None = None, **more: Any) -> Footprint:
    setting = Setting(**{"tokens": 256, "width": 64, "cards": True, "precision": "bf16", **more})
    return footprint.of(of or make(), setting, parallel, size)


def test_what_does_not_move_is_a_sum_by_hand() -> None:
    p = parameters()
    one, ddp, spread = held(), held("ddp", 8), held("fsdp", 8)
    assert (one.weights, one.optimizer, one.exchanged) == (4 * p, 8 * p, 0)
    assert (ddp.weights, ddp.optimizer) == (4 * p, 8 * p) and ddp.exchanged == 4 * p  # buckets: all gradients once more
    assert (spread.weights, spread.optimizer) == (4 * p / 8, 8 * p / 8)
    assert held(passes=2).gradients == 4 * p and held("fsdp", 8, passes=2).gradients >= 4 * p / 8
    assert held(optimizer="sgd").optimizer == 0
    lora = held("fsdp", 8, adapter=Adapter(r=4))
    added = sum(4 * (a + b) for a, b in ((128, 128), (128, 64), (128, 64), (128, 128), (128, 352), (128, 352), (352, 128))) * 3
    assert lora.weights == (2 * p + 4 * added) / 8 and lora.optimizer == 8 * added / 8  # a frozen base is half


def test_of_whole_layers_fsdp_holds_few_and_of_the_model_in_half_precision_none() -> None:
    """However deep a model is that computes its activations again, what is gathered is the root and a layer or two."""
    of = make(num_hidden_layers=24)
    p, shallow = parameters(num_hidden_layers=24), held("fsdp", 64, recompute=True)
    deep = held("fsdp", 64, recompute=True, of=of)
    assert deep.exchanged == pytest.approx(shallow.exchanged, rel=0.01)
    inputs = 21 * 256 * 128 * 4  # what is kept of each layer more
    assert deep.activations == pytest.approx(shallow.activations + inputs, rel=0.1) and deep.activations < shallow.activations + p


def test_fake_tensors_take_what_real_ones_do() -> None:
    """The same pass with real tensors, real attention in segments and real masks."""
    for scored in (1.0, 0.5):
        policy = Policy(make(vocabulary=4000)())
        policy.segments = True
        policy.train()
        width = 96
        weights = [0.0] * round(width * (1 - scored)) + [1.0] * round(width * scored)
        row = join([chain(list(range(width)), weights)] * 8)
        policy(row).sum().backward()  # what is done once
        policy.zero_grad(set_to_none=True)
        noted = Noted()
        for tensor in [*policy.parameters(), *policy.buffers()]:
            noted.piece(tensor)
        noted.events.clear()
        with noted, footprint.products.added_in_place():
            policy(row).sum().backward()
        real = sum(noted.most().values())
        told = held(of=make(vocabulary=4000), tokens=8 * width, width=width, scored=scored, cards=False, precision="float32")
        assert told.gradients + told.activations == pytest.approx(real, rel=0.05 if scored == 1 else 0.2), scored


def test_mixtures_of_experts_are_refused() -> None:
    config = MixtralConfig(vocab_size=500, num_local_experts=4, **SHAPE)
    with pytest.raises(ModelError, match="experts"):
        held(of=lambda: AutoModelForCausalLM.from_config(config))


# The command


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A folder with a configuration and nothing else."""
    LlamaConfig(vocab_size=1000, **SHAPE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert cli.main(["plan", *map(str, words)]) == code
    done = capsys.readouterr()
    return done.out + done.err


def row(text: str, name: str) -> list[str]:
    return re.split(r" {2,}", next(line for line in text.splitlines() if line.startswith(name)).strip())[1:]


def test_a_model_is_planned_from_its_configuration_alone(shape: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--machines", 2, "--gpus", 4, "--model", shape)
    p = size_of(str(shape), Path()).parameters
    assert row(text, "a card") == ["DDP", "FSDP2"]
    assert row(text, "weights") == [f"{4 * p / 1e6:.3g} MB", f"{4 * p / 8e3:.3g} kB"]
    assert "1 × 4096 tokens a card and step" in text and "Assumed: " in text and "989 TFLOP/s" in text and "50 to other machines" in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith(("a ", "weights", "tokens")))
    assert said(capsys, "--machines", 2, "--gpus", 4, "--model", shape / "config.json") == text
    more = said(capsys, "--gpus", 1, "--model", shape, *(w for v in ("adapter.r=4", "micro_tokens=512", "optimizer=sgd") for w in ("--set", f"sft.{v}")))
    assert row(more, "a card") == ["one"] and row(more, "optimiser") == ["0"] and "1 × 512 tokens" in more
    assert "no" in row(said(capsys, "--gpus", 8, "--model", shape, "--memory", 1, "--set", "sft.micro_tokens=65536"), "fits")


def test_time_is_a_sum_by_hand(shape: Path) -> None:
    machines = Machines(2, 4, memory=80e9, flops=1e15, link=400e9, network=40e9)
    file = shape.parent / "r.yaml"
    stages = {"rows": {"stage": "data", "source": "rows.jsonl"}, "sft": {"stage": "sft", "data": "rows", "micro_tokens": 512, "row_tokens": 128}}
    file.write_text(json.dumps({"name": "r", "model": "model", "stages": stages}))
    (found,) = plan.elsewhere(recipe.load(file), ["sft"], machines, looked_at=False)
    ddp, spread = found.ways
    p, root = found.size.parameters, 2 * 1000 * 128 + 128
    linear = p - 2 * 1000 * 128 - 7 * 128
    flops = 6 * (linear + 1000 * 128) + 3 * 4 * 128 * 128 * 3
    assert ddp.computing == pytest.approx(512 * flops / (0.4 * 1e15))
    assert ddp.exchanging == pytest.approx(2 * 4 * p * 7 / 8 / (0.7 * 40e9))  # there and back, once
    assert spread.exchanging == pytest.approx(4 * (2 * p - root + p) * 7 / 8 / (0.7 * 40e9))  # layers twice, gradients once


def test_a_recipe_says_how_its_stages_train(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"Скільки буде {n} та {n}?", "answer": f"Разом {2 * n}."} for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    sampling = {"stage": "rl", "data": "qa", "reward": ["rouge"], "completions": 4, "batch_size": 32, "decoding": {"max_new_tokens": 64, "temperature": 1.0}}
    stages = {
        "qa": {"stage": "data", "source": "qa.jsonl", "prompt": "{question}", "completion": "{answer}"},
        "sft": {"stage": "sft", "data": "qa", "adapter": {"r": 4}, "precision": "float32"},
        "grpo": {**sampling, "model": "sft", "activation_checkpointing": True},
    }
    (tmp_path / "own.yaml").write_text(json.dumps({"name": "own", "model": str(shape), "stages": stages}))
    text = said(capsys, tmp_path / "own.yaml", "--gpus", 2)
    one, two = text[text.index("sft:") : text.index("grpo:")], text[text.index("grpo:") :]
    assert "float32" in one and "activations kept" in one and "cache" not in one
    p = size_of(str(shape), Path()).parameters
    assert "activations computed again" in two and row(two, "whole copy") == ["0", f"{4 * p / 1e6:.3g} MB"]
    assert "grpo" not in said(capsys, tmp_path / "own.yaml", "--gpus", 2, "--stages", "sft")
    assert "trained by several processes" in said(capsys, tmp_path / "own.yaml", "--gpus", 2, "--stages", "qa", code=1)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no recipe is named"),
        (["--model", "MODEL"], "add --machines and --gpus"),
        (["--gpus", 2], "nothing says what is to be trained"),
        (["--gpus", 2, "--model", "MODEL", "--slurm"], "the job file runs one"),
        (["--gpus", 2, "--model", "EMPTY"], "has no config.json"),
        (["--gpus", 2, "--model", "./nowhere"], "there is no folder"),
        (["--gpus", 2, "--model", "STRANGE"], "no configuration that transformers knows"),
    ],
)
def test_what_cannot_be_planned(words: list[Any], text: str, shape: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("EMPTY", "STRANGE"):
        (shape.parent / name).mkdir()
    (shape.parent / "STRANGE" / "config.json").write_text('{"model_type": "never-heard-of"}')
    named = {"MODEL": shape, "EMPTY": shape.parent / "EMPTY", "STRANGE": shape.parent / "STRANGE"}
    assert text in said(capsys, *(named.get(w, w) for w in words), code=1)


def test_no_machines_are_a_wrong_flag() -> None:
    assert cli.main(["plan", "--machines", "0", "--model", "x"]) == 2


# Slurm

RECIPE = """\
name: far
model: tiny
stages:
  corpus: {stage: data, source: mini:uk-corpus, text: "{text}", take: 120, validation: 20, test: 0}
  tiny: {stage: pretrain, data: corpus, shape: {vocabulary: 600, hidden: 32, layers: 2, heads: 2, context: 320}, batch_size: 8, max_steps: 4000, checkpoint_every: 10}
"""
# What Slurm's own commands do, on this machine: two tasks of a step; their signal; the first machine's name.
STUBS = {
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] || exit 9; shift; for n in 1 2; do "$@" & echo $! >> "$TASKS"; done; code=0\nfor p in $(cat "$TASKS"); do wait "$p" || code=$?; done; rm "$TASKS"; exit $code',
    "scancel": '[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$TASKS")',
    "scontrol": 'case "$1" in show) echo localhost; echo another;; requeue) echo "$2" >> "$TASKS.again";; esac',
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far.yaml").write_text(RECIPE, encoding="utf-8")
    assert cli.main(["plan", "far.yaml", "--machines", "2", "--gpus", "1", "--slurm", "--set", "tiny.lr=1e-3", "launch.parallel=fsdp"]) == 0
    return tmp_path / "far.slurm"


def test_a_job_file_is_sound_and_never_overwritten(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["bash", "-n", job], check=True)
    text = job.read_text()
    for line in ("--nodes=2", "--gpus-per-node=1", "--requeue", "--signal=B:TERM@300", f"--chdir={job.parent}"):
        assert f"#SBATCH {line}\n" in text
    assert "-m temper run far.yaml --set tiny.lr=1e-3 --set launch.parallel=fsdp &" in text
    job.write_text("mine")
    assert "is there already" in said(capsys, "far.yaml", "--gpus", 1, "--slurm", code=1) and job.read_text() == "mine"
    assert "again whenever" in said(capsys, "far.yaml", "--gpus", 1, "--slurm", "--force", "tiny", code=1)


@pytest.fixture
def started(job: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the job as Slurm would."""
    (job.parent / "bin").mkdir()
    for name, text in STUBS.items():
        (job.parent / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (job.parent / "bin" / name).chmod(0o755)
    path = f"{job.parent / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "two", "TASKS": str(job.parent / "tasks"),
           "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        with (job.parent / f"log{len(running)}").open("w") as log:
            running.append(subprocess.Popen(["bash", job], env=env, cwd=job.parent, stdout=log, stderr=subprocess.STDOUT, text=True))
        return running[-1]

    yield start
    for one in running:
        if one.poll() is None:
            for child in [*psutil.Process(one.pid).children(recursive=True), one]:
                child.kill()
        one.wait()


def reached(run: Path) -> int:
    return max((int(p.name.partition("-")[2]) for p in run.glob("tiny.partial/checkpoints/step-*") if p.is_dir() and "." not in p.name), default=0)


@pytest.mark.claims
def test_two_machines_stop_when_the_job_is_told_and_go_on(job: Path, started: Callable[[], subprocess.Popen[str]]) -> None:
    """Two agents of torchrun meet at an address; SIGTERM to the job's script alone saves a checkpoint and queues it again."""
    before, run = 0, job.parent / "runs" / "far"
    for n in range(2):
        process = started()
        while reached(run) <= before:
            assert process.poll() is None, (job.parent / f"log{n}").read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        log = job.parent / f"log{n}"
        assert process.wait(90) == 143, log.read_text()[-3000:]
        saved = reached(run)
        assert f"goes on from step {saved} of stage tiny" in log.read_text()
        if n:
            assert f"goes on from step {before}\n" in log.read_text().replace(";", "\n")
        before = saved
    assert (job.parent / "tasks.again").read_text().split() == [str(os.getpid())] * 2


# What the kernel measures


@pytest.mark.claims
@pytest.mark.parametrize(("way", "name"), [("one", "recomputed"), ("one", "sgd-recomputed"), ("ddp", "lora"), ("fsdp", "sgd")])
def test_predicted_memory_is_within_fifteen_per_cent(way: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A light variant of benchmarks/footprints.py, whose own cases are in docs/scaling.md."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("footprints", BENCHMARKS / "footprints.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    case, (processes, parallel) = bench.CASES[name], bench.WAYS[way]
    bench.saved(tmp_path, case["hidden"], case["layers"])
    real = bench.measured(tmp_path, bench.TOKENS, processes, parallel, case) - bench.taken_anyway(way)
    told = bench.predicted(bench.TOKENS, processes, parallel, case).total
    assert told == pytest.approx(real, rel=0.15)


def test_the_type_that_weights_are_kept_in_changes_nothing(tmp_path: Path) -> None:
    """Hub models say bfloat16; what is trained is float32 whatever they say."""
    found = []
    for name, said in (("plain", {}), ("half", {"dtype": "bfloat16"}), ("older", {"torch_dtype": "bfloat16"})):
        folder = tmp_path / name
        folder.mkdir()
        shape = {"model_type": "qwen2", "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**shape, **said}))
        found.append(size_of(str(folder), tmp_path))
    weights = [footprint.of(size.make, footprint.Setting(tokens=64, width=64, cards=True, precision="bf16"), "fsdp", 2) for size in found]
    assert weights[0] == weights[1] == weights[2] and weights[0].weights == pytest.approx(2 * found[0].parameters)
