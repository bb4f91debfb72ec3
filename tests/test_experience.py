"""From rollouts to what a loss is given: KL by completion or by token, one of k, running means, short batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from temper import recipe as recipes
from temper import rewards
from temper.job import Job, Log
from temper.models.reference import Reference
from temper.models.scores import Policy
from temper.rollouts.sampler import Sampler
from temper.stages.experience import Experience, Prompt
from temper.types import Record
from tiny_models import build

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 5], [6, 6, 9]]
RL: dict[str, Any] = {
    "stage": "rl", "model": "base", "data": "news", "adapter": None, "reward": [{"regex": {"pattern": "[13579]"}}, {"length": {"target": 4}}],
    "classifier": None, "completions": 3, "batch_size": 2, "decoding": {"max_new_tokens": 6, "temperature": 1.0},
    "rollout_steps": 1, "iterations": 1, "merge": False,
}  # fmt: skip


class Words:
    """A tokenizer's part that the sampler and the rollout ask for."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, many: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in many]


def experience(folder: Path, *, shift: float = 0.3, **fields: Any) -> Experience:
    """Over a tiny model, whose reference is another."""
    torch.manual_seed(0)
    recipe = recipes.load(
        "detox-summarization", profile="smoke", overrides={"seed": 3, "stages": {"grpo": {**RL, **fields}}}
    )
    folder.mkdir(exist_ok=True)
    job = Job(recipe, "grpo", folder, {}, Log(None, quiet=True))
    policy = Policy(build("llama"))
    reference = Reference(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(shift * 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    prompts = [Prompt(Record({}, f"row {k}"), ids, f"p{k}", "") for k, ids in enumerate(PROMPTS)]
    stage: Any = job.stage
    sampler = Sampler(policy.hf, Words(), end_ids=[2, 3, 4, 5, 6, 7, 8])
    parts = rewards.read(stage.reward)
    return Experience(job, policy, sampler, prompts, stage._plan(job), parts, None, reference, "float32")


def rollout(e: Experience, number: int = 0) -> Any:
    return e._collect(number, first=False)


def by_completion(e: Experience, number: int = 0) -> list[dict[str, np.ndarray]]:
    """The columns of each completion, in order."""
    out: list[dict[str, np.ndarray]] = []
    for tree in (t for batch in e._trees(rollout(e, number)) for t in batch):
        of = tree.extra["completion"]
        out += [{n: v[of == c] for n, v in {**tree.extra, "weight": tree.weight}.items()} for c in np.unique(of)]
    return out


def kl_of(e: Experience, r: Any) -> list[np.ndarray]:
    """log p − log p_ref of each token, by plain padded passes."""
    out = []
    reference: Any = e.reference
    for p, c in zip(np.repeat(r.prompts, e.plan.completions), r.done, strict=True):
        ids = c.ids + ([] if c.end is None else [c.end])
        logps = []
        for model in (e.policy.hf, reference.copy.hf):
            with torch.no_grad():
                logits = model(torch.tensor([PROMPTS[p] + ids])).logits[0, len(PROMPTS[p]) - 1 : -1].log_softmax(-1)
            logps.append(logits.gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy())
        out.append(logps[0] - logps[1])
    return out


def test_kl_in_the_reward_by_completion_and_by_token(tmp_path: Path) -> None:
    e = experience(tmp_path / "a", algorithm="rloo", kl={"beta": 0.5})
    r = rollout(e)
    kl = kl_of(e, r)
    assert len({len(k) for k in kl}) > 1 and max(abs(k).max() for k in kl) > 0.1
    plain = sum(r.each.values())
    total = plain - 0.5 * np.array([k.sum() for k in kl])
    assert np.allclose(r.total, total, atol=1e-4)
    groups = total.reshape(-1, 3)
    expected = (groups - (groups.sum(1, keepdims=True) - groups) / 2).reshape(-1)
    for c, a, k in zip(by_completion(e), expected, kl, strict=True):
        assert np.allclose(c["advantage"], a, atol=1e-4) and np.allclose(c["weight"], 1 / len(k))

    e = experience(tmp_path / "b", algorithm="rloo", kl={"beta": 0.5, "level": "token"})
    assert np.allclose(rollout(e).total, total, atol=1e-4)
    own = plain.reshape(-1, 3)
    others = (groups.sum(1, keepdims=True) - groups) / 2
    for c, reward, other, k in zip(by_completion(e), own.reshape(-1), others.reshape(-1), kl, strict=True):
        to_go = k[::-1].cumsum()[::-1]  # a token's KL and that of those after it
        assert np.allclose(c["advantage"], reward - 0.5 * to_go - other, atol=1e-4)


def test_kl_by_token_is_in_the_unit_of_the_advantage(tmp_path: Path) -> None:
    e = experience(tmp_path / "a", algorithm="reinforce++", kl={"beta": 0.5})
    r = rollout(e)
    spread = r.total.std(ddof=1) + 1e-4
    for c, t, k in zip(by_completion(e), r.total, kl_of(e, r), strict=True):
        assert np.allclose(c["advantage"], (t - r.total.mean() + 0.5 * (k.cumsum() - k)) / spread, atol=1e-3)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_one_completion_stands_for_all(tmp_path: Path, place: str) -> None:
    fields: dict[str, Any] = {"algorithm": "rloo", "kl": {"beta": 0.5, "place": place, "samples": "one"}}
    e = experience(tmp_path / "a", **fields)
    r = rollout(e)
    kl = kl_of(e, r)
    drawn = np.array([c["drawn"][0] for c in by_completion(e)])
    assert set(drawn) == {0.0, 3.0} and (drawn.reshape(-1, 3).sum(1) == 3).all()
    for c, k, d in zip(by_completion(e), kl, drawn, strict=True):
        assert (c["drawn"] == d).all()
        if d:
            assert np.allclose(c["sampled"] - c["reference"], k, atol=1e-4)
    charged = 0.5 * drawn * np.array([k.sum() for k in kl]) if place == "reward" else 0
    assert np.allclose(r.total, sum(r.each.values()) - charged, atol=1e-4)
    again = experience(tmp_path / "b", **fields)
    rollout(again)
    draws = [np.array([c["drawn"][0] for c in by_completion(x, n)]) for x in (e, again) for n in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(draws[:3], draws[3:], strict=True)), "a function of the seed"
    often = np.mean([e._drawn(n, [0, 1, 2, 3, 4]).reshape(5, 3) for n in range(100)], axis=0)
    assert np.allclose(often, 1 / 3, atol=0.17), "each rollout and prompt anew"


def test_a_running_mean_is_that_of_all_earlier_rollouts_and_kept_on_disk(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"algorithm": "reinforce", "completions": 1, "kl": {"beta": 0.0}}
    e = experience(tmp_path / "a", **fields)
    found = [rollout(e, n) for n in range(4)]
    assert [len(r.done) for r in found] == [2, 2, 1, 2], "the last batch of an epoch is shorter"
    assert np.allclose(found[0].advantage, found[0].total - found[0].total.mean())
    for n in range(1, 4):
        earlier = np.concatenate([r.total for r in found[:n]]).mean()
        assert np.allclose(found[n].advantage, found[n].total - earlier)
    other = experience(tmp_path / "a", **fields)  # the same folder: a run that goes on
    (tmp_path / "a" / "rollouts" / "3.rollout").unlink()
    assert other.ready(3) and np.array_equal(rollout(other, 3).advantage, found[3].advantage)
    (tmp_path / "a" / "rollouts" / "3.rollout").unlink()
    (tmp_path / "a" / "rollouts" / "2.rollout").write_bytes(b"torn")
    assert not other.ready(3), "its baseline is gone, so the run goes back"
    e._forget(3)
    assert [f.stem for f in (tmp_path / "a" / "rollouts").iterdir()] == ["2"]


def test_the_averages_of_tokens(tmp_path: Path) -> None:
    for average, weight in [("token", lambda n: 1.0), ("sum", lambda n: 1 / n), ("constant", lambda n: 1 / n)]:
        e = experience(tmp_path / average, average=average)
        for c in by_completion(e):
            assert np.allclose(c["weight"], weight(len(c["weight"])))


def test_a_collapse_is_told_once_and_by_a_run_that_goes_on(tmp_path: Path) -> None:
    e = experience(tmp_path / "a", collapse={"rollouts": 4, "variety": 0.5}, kl={"beta": 0.0})
    r, w = rollout(e), e.watch
    words = [[f"{n} {k} {k + n} {k * n}" for k in range(len(r.done))] for n in range(4)]
    same = ["a b c d e"] * len(r.done)
    for step, (texts, reward) in enumerate([(words[0], 0.1), (words[1], 0.2), (same, 0.5), (same, 0.6), (same, 0.7)]):
        r.texts, r.total = texts, np.linspace(0, 0.1, len(r.done)) + reward
        if step == 2:  # killed and started again
            w = type(w)(e.job, e.plan)
        w.log(step + 1, r, e.prompts)
        assert len(e.job.warnings) == (step >= 3), step
    assert "self_bleu falls below 0.5" in e.job.warnings[0]
