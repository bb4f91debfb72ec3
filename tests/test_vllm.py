"""Rollouts by a server: `rl` against `temper serve` over real HTTP, with a proxy between them where something is to go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import temper
from preferred import model_at, pairs, text
from proxied import proxied
from serving import Server, server
from staged_runs import ENVIRONMENT, lines_of, weights
from temper import hub
from temper import recipe as recipes
from temper.cli import main
from temper.errors import ModelError, RecipeError, TrainingError
from temper.models import load
from temper.pipeline import settings
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.rollouts.vllm import replayed
from temper.runfolder import read_json
from temper.stages.agreement import compare

STAGE: dict[str, Any] = {
    "stage": "rl", "data": "rows", "adapter": {"method": "lora", "r": 4}, "reward": [{"regex": {"pattern": "^w[1-4]"}}],
    "completions": 4, "batch_size": 4, "max_steps": 4, "lr": 3e-3, "precision": "float32", "kl": {"beta": 0.04},
    "decoding": {"max_new_tokens": 8, "temperature": 1.0},
}  # fmt: skip


def recipe(folder: Path, model: Path | str, url: str, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p["prompt"], "completion": text(60)} for p in pairs(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {
        "stage": "data", "source": "rows.jsonl", "validation": 0, "test": 0, "near_leaks": False, "drop": {"duplicates": "off"},
    }  # fmt: skip
    rollouts = {"engine": "vllm", "url": url, **fields.pop("rollouts", {})}
    stage = {**STAGE, "rollouts": rollouts, **fields}
    top = {"name": "r", "model": str(model), "threads": 1, "stages": {"rows": data, "grpo": stage}}
    (folder / "r.yaml").write_text(json.dumps(top), encoding="utf-8")
    return folder / "r.yaml"


def run(folder: Path, model: Path, url: str, **fields: Any) -> Path:
    return temper.run(recipe(folder, model, url, **fields), out=folder / "run", quiet=True) / "grpo"


def rollouts_of(stage: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(stage / "metrics.jsonl") if "reward" in line]


@pytest.fixture(scope="module")
def engine(words_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the words, and loads adapters from wherever tests run."""
    votes = str(tmp_path_factory.mktemp("votes") / "votes.sqlite")
    with server(f"words={words_model}", "--adapters-from", str(tmp_path_factory.getbasetemp()), "--votes", votes) as made:
        yield made


def names(engine: Server) -> list[str]:
    return [card["id"] for card in engine.get("/v1/models").json()["data"]]


def test_a_run_from_end_to_end(engine: Server, words_model: Path, tmp_path: Path) -> None:
    """What the server says of its samples is what the policy says, at every hand-over; an adapter comes when the last has gone."""
    there: list[int] = []

    def look(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/load_lora_adapter":
            there.append(len(list(Path(body["lora_path"]).parent.iterdir())))
        return body

    with proxied(engine.address, look) as proxy:
        stage = run(tmp_path, words_model, proxy.url)
    lines = rollouts_of(stage)
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and all(0 < x["engine_gap"] < 1e-5 for x in lines)
    assert lines[0]["engine_lag"] is None, "before the first step an adapter does nothing"
    assert all(abs(x["engine_lag"]) < 0.01 for x in lines[1:])
    steps = [x for x in lines_of(stage / "metrics.jsonl") if "loss" in x]
    assert all(x["sampling_gap"] < 1e-5 and x["ratio"] == pytest.approx(1, abs=1e-5) for x in steps)
    assert read_json(stage / "stage.json")["facts"]["sampler"].startswith(f"vLLM's protocol at {proxy.url}, base «words»")

    # one for the trial and one a rollout, none beside another, none left
    moves = [p for p in proxy.passed if "lora_adapter" in p.path]
    assert [p.path.removeprefix("/v1/").partition("_")[0] for p in moves] == ["load", "unload"] * 5
    assert len({p.body["lora_name"] for p in moves}) == 5 and there == [1] * 5
    assert all(a.body["lora_name"] == b.body["lora_name"] for a, b in zip(moves[::2], moves[1::2], strict=True))
    assert names(engine) == ["words"] and not (stage / "rollouts").exists() and (stage / "adapter").is_dir()

    # before the first step the samples are those of the sampler on this model, under the seeds that were sent
    hf = load.model(hub.Source(str(words_model)))[0]
    sampler = Sampler(hf, load.tokenizer(hub.Source(str(words_model))), end_ids=load.end_ids(hf))
    first = [p for p in proxy.of("completions") if p.body["model"] == moves[2].body["lora_name"]]
    assert len(first) == 4 and len({p.body["seed"] for p in first}) == 4
    for asked in first:
        own = sampler.sample([asked.body["prompt"]], Decoding(max_new_tokens=8, temperature=1.0), completions=4, seed=asked.body["seed"])[0]
        choices = asked.json["choices"]
        assert [c["token_ids"] for c in choices] == [c.scored for c in own]
        for choice, mine in zip(choices, own, strict=True):
            assert np.allclose(choice["logprobs"]["token_logprobs"], mine.raw, atol=1e-5)


def test_at_another_temperature_the_plain_softmax_is_compared_and_the_policy_scored_at_its_own(
    engine: Server, words_model: Path, tmp_path: Path
) -> None:
    with proxied(engine.address) as proxy:
        stage = run(
            tmp_path, words_model, proxy.url, decoding={"max_new_tokens": 8, "temperature": 0.6}, rollout_steps=2, iterations=2,
        )  # fmt: skip
    (line,) = rollouts_of(stage)
    raw = [p for c in proxy.of("completions") if c.body["temperature"] == 0.6 for x in c.json["choices"] for p in x["logprobs"]["token_logprobs"]]
    assert line["engine_gap"] < 1e-5 and line["entropy"] < -np.mean(raw) - 0.1, "colder than the softmax that was compared"
    steps = [x for x in lines_of(stage / "metrics.jsonl") if "loss" in x]
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-5) and abs(steps[-1]["ratio"] - 1) > 1e-5


def test_a_whole_model_is_handed_over_by_its_weights(words_model: Path, tmp_path: Path) -> None:
    """Reloaded before anything, so that what an earlier run has left at the server does no harm; stale weights are told."""
    fields: dict[str, Any] = {"adapter": None, "max_steps": 3, "lr": 1e-3}
    other = model_at(tmp_path / "other", seed=1)
    with server(
        str(other), "--adapters-from", str(tmp_path), "--reload", "--votes", str(tmp_path / "v.sqlite")
    ) as made, proxied(made.address) as proxy:  # fmt: skip
        stage = run(tmp_path / "a", words_model, proxy.url, **fields)
        lines = rollouts_of(stage)
        assert [x["step"] for x in lines] == [1, 2, 3] and all(0 < x["engine_gap"] < 1e-5 and x["engine_lag"] is None for x in lines)
        assert len([p for p in proxy.passed if p.path == "/collective_rpc"]) == 5, "the start, the trial, and three rollouts"
        assert not (stage / "rollouts").exists() and (stage / "model").is_dir()

        def forgets(path: str, body: dict[str, Any]) -> dict[str, Any] | tuple[int, str]:
            reloads.extend([path] * (path == "/collective_rpc"))
            return (200, "{}") if path == "/collective_rpc" and len(reloads) > 2 else body

        reloads: list[str] = []
        with proxied(made.address, forgets) as stale, pytest.raises(TrainingError, match=r"nats a token on average from the policy's own; rollouts") as error:
            run(tmp_path / "b", words_model, stale.url, rollouts={"bound": 1e-3}, **fields)
        assert "raw_logprobs" in error.value.do
        assert made.post("/collective_rpc", {"method": "shutdown", "kwargs": {"weights_path": "x"}}).status_code == 400
    with server(str(words_model), "--adapters-from", str(tmp_path), "--votes", str(tmp_path / "v.sqlite")) as made:
        with pytest.raises(ModelError, match=r"does not take the weights in .*status 404") as error:
            run(tmp_path / "c", words_model, made.url, **fields)
        assert "VLLM_SERVER_DEV_MODE=1" in error.value.do and "--reload" in error.value.do


# What goes wrong


def test_adapters_that_are_never_loaded_stop_the_run(engine: Server, words_model: Path, tmp_path: Path) -> None:
    """A server that says «Success» and answers from its base. The steps are so small that the bound hears nothing of it."""

    def forgets(path: str, body: dict[str, Any]) -> dict[str, Any] | tuple[int, str]:
        if "lora_adapter" in path:
            return 200, "Success"
        return body | {"model": "words"} if "model" in body else body

    with proxied(engine.address, forgets) as proxy, pytest.raises(TrainingError, match="100% of what the adapter has learnt") as error:
        run(tmp_path, words_model, proxy.url, lr=1e-3)
    assert error.value.where == proxy.url and "look at its log" in error.value.do
    lines = [x for x in lines_of(tmp_path / "run/grpo.partial/metrics.jsonl")]
    assert {x["step"] for x in lines} == {1}, "the first rollout is still the base's own"


def late(from_load: int) -> Callable[[str, dict[str, Any]], Any]:
    """From the load of that number on, a server that is one adapter behind, and forgets none."""
    loaded: list[str] = []

    def meddle(path: str, body: dict[str, Any]) -> dict[str, Any] | tuple[int, str]:
        if path == "/v1/unload_lora_adapter":
            return 200, "Success"
        if path == "/v1/load_lora_adapter":
            loaded.append(body["lora_name"])
        elif path == "/v1/completions" and len(loaded) >= from_load:
            return body | {"model": loaded[-2]}
        return body

    return meddle


def test_stale_adapters_stop_the_run_by_the_bound(engine: Server, words_model: Path, tmp_path: Path) -> None:
    with proxied(engine.address, late(6)) as proxy:
        with pytest.raises(TrainingError, match=r"differ by 0\.\d+ nats a token on average .* rollouts.bound allows 0.001") as error:
            run(tmp_path, words_model, proxy.url, max_steps=8, rollouts={"bound": 1e-3})
        assert "raw_logprobs" in error.value.do
    lines = rollouts_of(tmp_path / "run/grpo.partial")
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and all(x["engine_gap"] < 1e-5 for x in lines)
    for name in names(engine)[1:]:
        engine.post("/v1/unload_lora_adapter", {"lora_name": name})


def test_another_base_is_told_before_anything_is_sampled(tmp_path: Path, words_model: Path) -> None:
    other = model_at(tmp_path / "other", seed=1)
    with server(str(other), f"words={words_model}", "--votes", str(tmp_path / "v.sqlite")) as made:
        with pytest.raises(ModelError, match="serves 2 base models") as error:
            run(tmp_path / "a", words_model, made.url)
        assert "NAME being one of other, words" in error.value.do
        with pytest.raises(ModelError, match="serves another base model than the policy's: «other»"):
            run(tmp_path / "b", words_model, f"{made.url}#other")
        with pytest.raises(ModelError, match="no base model «word»") as error:
            run(tmp_path / "c", words_model, f"{made.url}#word")
        assert error.value.do == "did you mean «words»?"
        with pytest.raises(ModelError, match=r"does not take the adapter .* this server loads no adapters") as error:
            run(tmp_path / "d", words_model, f"{made.url}#words")
        assert "--max-lora-rank of 4 or more" in error.value.do and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in error.value.do


def test_a_context_that_is_too_short(engine: Server, words_model: Path, tmp_path: Path) -> None:
    cards = {"data": [{"id": "words", "max_model_len": 16}]}
    said = "takes 16 tokens, and the longest prompt comes to 20"
    with proxied(engine.address, lambda *_: (200, json.dumps(cards))) as proxy, pytest.raises(ModelError, match=said) as error:
        run(tmp_path, words_model, proxy.url)
    assert "--max-model-len 20" in error.value.do


def test_nobody_answers(words_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, words_model, "http://127.0.0.1:9/v1")  # the discard port
    began = time.monotonic()
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 1
    assert time.monotonic() - began < 10
    said = " ".join(capfd.readouterr().err.split())
    assert "the engine gave no answer in 2 attempts; the last time: broken connection" in said and "http://127.0.0.1:9/v1" in said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": [{"index": 0, "text": "x", "logprobs": {"token_logprobs": [-1.0]}}]}, "gives no token ids"),
        ({"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}}]}, "1 instead of 2"),
        (
            {"choices": [{"index": k, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}} for k in range(2)]},
            "one ends neither at an end token nor at the limit",
        ),
    ],
)
def test_answers_that_are_not_what_was_asked_for(
    answer: Any, said: str, engine: Server, words_model: Path, tmp_path: Path
) -> None:
    meddle = lambda path, body: (200, json.dumps(answer)) if path == "/v1/completions" else body  # noqa: E731
    with proxied(engine.address, meddle) as proxy, pytest.raises(ModelError, match=said):
        run(tmp_path, words_model, proxy.url)


def test_a_server_that_was_started_anew_has_forgotten_the_adapter(engine: Server, words_model: Path, tmp_path: Path) -> None:
    def anew(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions" and body["model"].endswith("-3"):
            engine.post("/v1/unload_lora_adapter", {"lora_name": body["model"]})
        return body

    with proxied(engine.address, anew) as proxy, pytest.raises(ModelError, match="the engine does not know «temper-grpo-") as error:
        run(tmp_path, words_model, proxy.url)
    assert "the same command goes on from here" in error.value.do
    assert [x["step"] for x in rollouts_of(run(tmp_path, words_model, engine.url))] == [1, 2, 3, 4] and names(engine) == ["words"]


def test_a_completion_that_goes_on_behind_its_end_is_none() -> None:
    asked, ends = Decoding(max_new_tokens=3, temperature=1.0), frozenset({2})
    whole = replayed([5, 2], [-1.0, -0.5], asked, ends)
    assert whole is not None and (whole.ids, whole.end, whole.ended) == ([5], 2, True) and whole.raw.tolist() == [-1.0, -0.5]
    cut = replayed([5, 6, 7], [-1.0, -0.5, -2.0], asked, ends)
    assert cut is not None and (cut.ids, cut.end, cut.ended) == ([5, 6, 7], None, False)
    assert replayed([5, 2, 6], [-1.0] * 3, asked, ends) is None and replayed([5, 6], [-1.0] * 2, asked, ends) is None
    assert replayed([5, 2], [-1.0], asked, ends) is None and replayed([5, 2], [-1.0, None], asked, ends) is None


# Going on

KILLED = """
import sys, temper
temper.run(sys.argv[1], out=sys.argv[2], quiet=True)
"""


def test_a_run_that_is_killed_goes_on_and_takes_back_what_it_left(engine: Server, words_model: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpoint_every": 1, "max_steps": 5, "rollout_steps": 2}
    whole = run(tmp_path / "whole", words_model, engine.url, **fields)
    process: list[subprocess.Popen[str]] = []
    seen: list[str] = []

    def kill(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions" and process:
            seen.append(body["model"])
            if len(set(seen)) == 4:  # base, trial, first rollout: in the second one
                process.pop().kill()
        return body

    with proxied(engine.address, kill) as proxy:
        file = recipe(tmp_path / "killed", words_model, proxy.url, **fields)
        command = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "killed/run")]
        process.append(started := subprocess.Popen(command, env=os.environ | ENVIRONMENT, text=True))
        assert started.wait(120) == -signal.SIGKILL
        left = [name for name in names(engine) if name != "words"]
        assert len(left) == 1 and left[0].startswith("temper-grpo-")
        temper.run(file, out=tmp_path / "killed/run", quiet=True)
        assert left[0] in [p.body["lora_name"] for p in proxy.of("unload_lora_adapter")] and names(engine) == ["words"]
    assert weights(tmp_path / "killed/run") == weights(tmp_path / "whole/run")
    assert [x["step"] for x in rollouts_of(whole)] == [1, 3, 5]
    assert [x["reward"] for x in rollouts_of(tmp_path / "killed/run/grpo")] == [x["reward"] for x in rollouts_of(whole)]


def test_two_processes_take_the_same_samples(engine: Server, words_model: Path, tmp_path: Path) -> None:
    """Also where the weights are spread over them, and put together for each hand-over."""
    alone = run(tmp_path / "one", words_model, engine.url, max_steps=2)
    file = recipe(tmp_path / "two", words_model, engine.url, max_steps=2)
    launched = ["--set", "launch.processes=2", "--set", "launch.parallel=fsdp"]
    command = [sys.executable, "-m", "temper", "run", str(file), "--out", str(tmp_path / "two/run"), *launched]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rollouts_of(alone), rollouts_of(tmp_path / "two/run/grpo"), strict=True):
        assert two["reward"] == pytest.approx(one["reward"]) and two["entropy"] == pytest.approx(one["entropy"], abs=1e-4)
        assert two["engine_gap"] < 1e-5
    assert names(engine) == ["words"]


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter": {"method": "ia3"}}, "this one is ia3"),
        ({"adapter": {"method": "lora", "dora": True}}, "this one is DoRA"),
        ({"adapter": {"method": "lora+prompt"}}, r"this one is lora\+prompt"),
        ({"quantize": "nf4"}, "base is rounded"),
        ({"decoding": {"stop": ["x"]}}, "stop strings"),
        ({"rollouts": {"url": None}}, "needs a url"),
        ({"rollouts": {"url": "words"}}, "is no URL"),
        ({"rollouts": {"url": "http://me:key@host/v1"}}, "holds more than a host and a path"),
        ({"rollouts": {"engine": "native"}}, "url belongs to engine: vllm"),
        ({"rollouts": {"bound": 0}}, "bound"),
        ({"stage": "warp"}, "a server has one base"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    if fields.get("stage") == "warp":
        fields = fields | {"front": []}
    with pytest.raises(RecipeError, match=said):
        recipes.load(recipe(tmp_path, "m", "http://127.0.0.1:8000/v1", **fields))


def test_where_the_server_is_and_what_is_allowed_are_no_part_of_the_key(tmp_path: Path) -> None:
    def deciding(url: str, **fields: Any) -> dict[str, Any]:
        return settings(recipes.load(recipe(tmp_path, "m", url, **fields)).stages["grpo"])

    one = deciding("http://127.0.0.1:8000/v1")
    assert one == deciding("http://gpu:9000/v1#m", rollouts={"bound": 0.3}) and one["rollouts"] == {"engine": "vllm"}


# Numbers


def test_what_a_comparison_finds() -> None:
    """Rounding of a server is told from an adapter that it lacks, also where it is the larger of the two."""
    rng = np.random.default_rng(3)
    base = rng.normal(-3, 1, 4000)
    own = base + rng.normal(0, 0.01, 4000)
    noise = rng.normal(0, 0.02, 4000)
    fresh, stale, half = (compare(x + noise, own, base, 2e-4) for x in (own, base, (own + base) / 2))
    assert fresh.lag == pytest.approx(0, abs=0.15) and stale.lag == pytest.approx(1, abs=0.15) and half.lag == pytest.approx(0.5, abs=0.15)
    assert fresh.gap == pytest.approx(0.02 * np.sqrt(2 / np.pi), rel=0.1), "the mean of |noise|"
    fresh.check(0.1, "here", "it")
    with pytest.raises(TrainingError, match="of what the adapter has learnt is missing"):
        stale.check(0.1, "here", "it")
    with pytest.raises(TrainingError, match=r"allows 0.01"):
        fresh.check(0.01, "here", "it")
    with pytest.raises(TrainingError, match="differ by nan"):
        compare(np.full(40, np.nan), own[:40], base[:40], 2e-4).check(0.1, "here", "it")
    # an adapter that does nothing yet, seen through rounding of the policy's own: nothing can be said
    still = rng.normal(0, 1e-6, (2, 4000))
    assert compare(base, base + still[0], base + still[1], 2e-4).lag is None
    assert compare(base[:20], own[:20], base[:20], 2e-4).lag is None
