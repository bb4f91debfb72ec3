"""Policy losses and KL estimates: by hand, against float64, and against TRL's trainers on one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.advantages import group
from temper.losses import divergence, grpo, policy_losses, summed, with_divergence
from temper.models.scores import Policy
from temper.trees import Node, Tree, flatten, rows_of
from tiny_models import VOCABULARY, build

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]
LENGTHS = [[6, 3, 4, 7], [2, 5, 7, 1]]  # of the completions
LONGEST = 7


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


COMPLETIONS = [[draw(n, 10 * p + k) for k, n in enumerate(lengths)] for p, lengths in enumerate(LENGTHS)]
REWARDS = np.array([[0.1, 0.9, 0.4, 0.4], [1.0, 0.0, 0.25, 0.5]])


def trees(average: str, columns: dict[str, list[list[np.ndarray]]]) -> list[Tree]:
    """Groups as the rl stage builds them: one tree a prompt, columns along the scored tokens."""
    out, first = [], 0
    for p, prompt in enumerate(PROMPTS):
        nodes = [Node(c, [1.0 if average == "token" else 1 / len(c)] * len(c)) for c in COMPLETIONS[p]]
        extra = {name: np.concatenate(values[p]).astype(np.float32) for name, values in columns.items()}
        extra["completion"] = np.repeat(np.arange(first, first + len(nodes)), LENGTHS[p]).astype(np.float32)
        first += len(nodes)
        tree = flatten(Node(prompt, None, tuple(nodes)))
        out.append(Tree(**{**tree.__dict__, "extra": extra}))
    return out


def noisy(scale: float, seed: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[rng.normal(0, scale, n) for n in lengths] for lengths in LENGTHS]


def columns(model: Any) -> dict[str, list[list[np.ndarray]]]:
    """Old and reference log-probabilities near the model's own, so that some ratios are clipped and some are not."""
    own = []
    with torch.no_grad():
        for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
            row = []
            for c in completions:
                logits = model(torch.tensor([prompt + c])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                row.append(logits.gather(-1, torch.tensor(c)[:, None])[:, 0].numpy())
            own.append(row)
    advantage = group(REWARDS).advantage(REWARDS)
    return {
        "old": [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(own, noisy(0.3, 1), strict=True)],
        "reference": [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(own, noisy(0.2, 2), strict=True)],
        "advantage": [[np.full(n, advantage[p, k]) for k, n in enumerate(ns)] for p, ns in enumerate(LENGTHS)],
    }


def ours(model: Any, average: str, found: dict[str, Any], loss: Any, micro_tokens: int) -> tuple[float, dict[str, Any]]:
    rows = rows_of(trees(average, found), 16, micro_tokens)
    divisor = sum(float(r.weight.sum()) for r in rows)
    total = torch.zeros(())
    for row in rows:
        terms = loss(Policy(model)(row), row.weight, **row.extra)
        total = total + (terms.values * terms.weights).sum() / divisor
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def padded(values: list[list[np.ndarray]]) -> torch.Tensor:
    lines = [np.pad(v, (0, LONGEST - len(v))) for row in values for v in row]
    return torch.tensor(np.array(lines), dtype=torch.float32)


def trl_trainer(model: Any, folder: Path, kind: str = "GRPO", **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=LONGEST,
        report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False, beta=0.0, **settings,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w5 w6", "w7"]}),
    )  # fmt: skip


def batch_of(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same completions as TRL's trainers take them."""
    prompt_width = max(map(len, PROMPTS))
    lines = [(p, c) for p, cs in zip(PROMPTS, COMPLETIONS, strict=True) for c in cs]
    return {
        "prompt_ids": torch.tensor([[0] * (prompt_width - len(p)) + p for p, _ in lines]),
        "prompt_mask": torch.tensor([[0] * (prompt_width - len(p)) + [1] * len(p) for p, _ in lines]),
        "completion_ids": torch.tensor([c + [0] * (LONGEST - len(c)) for _, c in lines]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (LONGEST - len(c)) for _, c in lines]),
        "advantages": torch.tensor([a[0] for row in found["advantage"] for a in row], dtype=torch.float32),
        "old_per_token_logps": padded(found["old"]),
        "ref_per_token_logps": padded(found["reference"]),
        "old_logps": padded(found["old"]).sum(1),
        "num_items_in_batch": torch.tensor(sum(map(sum, LENGTHS))),
    }


def composed(name: str, average: str, beta: float, **options: Any) -> Any:
    """A loss as the rl stage puts it together."""

    def inner(*args: torch.Tensor, **columns: torch.Tensor) -> Any:
        return policy_losses.get(name)(*args, **columns, **options)

    if beta:
        inner = with_divergence(inner, beta, "k3")
    if average in ("sum", "constant"):
        inner = summed(inner, 1.0 if average == "sum" else LONGEST)

    def loss(*args: torch.Tensor, reference: torch.Tensor, **columns: torch.Tensor) -> Any:
        return inner(*args, **columns, **({"reference": reference} if beta else {}))

    return loss


CLIP: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "average", "options", "kind", "theirs"),
    [
        ("grpo", "sequence", {**CLIP, "delta": 1.6}, "GRPO", {**CLIP, "delta": 1.6, "loss_type": "grpo"}),
        ("grpo", "token", {**CLIP, "delta": 1.6}, "GRPO", {**CLIP, "delta": 1.6, "loss_type": "bnpo"}),
        ("dr_grpo", "constant", CLIP, "GRPO", {**CLIP, "loss_type": "dr_grpo"}),
        ("dapo", "token", {}, "GRPO", {**CLIP, "loss_type": "dapo"}),
        ("reinforce++", "sequence", CLIP, "GRPO", {**CLIP, "loss_type": "grpo"}),
        ("cispo", "token", {"ceiling": 1.2}, "GRPO", {"epsilon_high": 1.2, "loss_type": "cispo"}),
        (
            "gspo",
            "sequence",
            {"epsilon": 0.02, "epsilon_high": 0.04},
            "GRPO",
            {"epsilon": 0.02, "epsilon_high": 0.04, "loss_type": "grpo", "importance_sampling_level": "sequence"},
        ),
        ("rloo", "sum", CLIP, "RLOO", CLIP),
    ],
)
def test_value_and_gradient_equal_trl(
    tmp_path: Path, name: str, average: str, options: dict[str, Any], kind: str, theirs: dict[str, Any]
) -> None:
    model = build("llama").float()
    found = columns(model)
    trainer = trl_trainer(model, tmp_path, kind, **theirs)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    # the KL of gspo is corrected by the completion's ratio there and by the token's here; TRL's RLOO has it in the reward
    for beta in (0.0, 0.1) if name not in ("gspo", "rloo") else (0.0,):
        trainer.beta = beta  # set afterwards: with one from the start the trainer loads a reference model of its own
        model.zero_grad()
        expected = trainer._compute_loss(model, batch_of(found))
        expected.backward()
        slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for micro in (16, 512):
            value, gradient = ours(model, average, found, composed(name, average, beta, **options), micro)
            assert value == pytest.approx(expected.item(), abs=1e-5)
            assert gradient.keys() == slopes.keys()
            whole = torch.cat([s.flatten() for s in slopes.values()]).norm()
            apart = torch.cat([(gradient[n] - s).flatten() for n, s in slopes.items()]).norm()
            assert apart / whole < 1e-5
    terms = policy_losses.get(name)(**flat(found), **options)
    assert 0 < float(terms.extras["clipped"].mean()) < 1, "the batch exercises the clipping"


def flat(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Columns of all tokens, one after another, the reference's log-probabilities as if they were the policy's."""
    out = {n: torch.from_numpy(np.concatenate([v for row in rows for v in row])) for n, rows in found.items()}
    lengths = [n for row in LENGTHS for n in row]
    of = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    return {"logps": out["reference"], "weights": torch.ones(len(of)), "completion": of, "old": out["old"], "advantage": out["advantage"]}  # fmt: skip


# What every registered loss keeps to

LINES = st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 2)), min_size=1, max_size=5)  # length, advantage


def tokens(lines: list[tuple[int, float]], seed: int) -> dict[str, torch.Tensor]:
    """Completions of these lengths and advantages, with random log-probabilities and weights of 1/|o|."""
    lengths = torch.tensor([n for n, _ in lines])
    g = torch.Generator().manual_seed(seed)
    return {
        "logps": -3 * torch.rand(int(lengths.sum()), generator=g, dtype=torch.float64),
        "weights": (1 / lengths.double()).repeat_interleave(lengths),
        "advantage": torch.tensor([a for _, a in lines], dtype=torch.float64).repeat_interleave(lengths),
        "completion": torch.arange(len(lines)).repeat_interleave(lengths).float(),
    }


@pytest.mark.parametrize("name", policy_losses)
@settings(max_examples=20, deadline=None)
@given(lines=LINES, seed=st.integers(0, 99))
def test_at_the_sampling_policy_the_gradient_is_the_advantage(
    name: str, lines: list[tuple[int, float]], seed: int
) -> None:
    columns = tokens(lines, seed)
    for old in (None, columns["logps"]):
        logps = columns["logps"].clone().requires_grad_()
        terms = policy_losses.get(name)(**{**columns, "logps": logps, "old": old})
        assert terms.values.shape == logps.shape and all(not x.requires_grad for x in terms.extras.values())
        (terms.values * terms.weights).sum().backward()
        assert torch.allclose(logps.grad, -columns["advantage"] * columns["weights"], atol=1e-12)  # type: ignore[arg-type]
        logps.grad = None
        terms = summed(policy_losses.get(name), 4.0)(**{**columns, "logps": logps, "old": old})
        (terms.values * terms.weights).sum().backward()
        assert torch.allclose(logps.grad, -columns["advantage"] / 4, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", policy_losses)
@settings(max_examples=20, deadline=None)
@given(lines=LINES, seed=st.integers(0, 99), cut=st.integers(0, 5))
def test_no_loss_depends_on_how_a_batch_is_cut(name: str, lines: list[tuple[int, float]], seed: int, cut: int) -> None:
    columns = tokens(lines, seed)
    columns["old"] = columns["logps"] + 0.3 * torch.sin(7 * columns["logps"])
    columns["reference"] = columns["logps"] + 0.2 * torch.cos(5 * columns["logps"])
    first = columns["completion"] < cut
    inner = with_divergence(policy_losses.get(name), 0.3, "k2", level="sequence")
    for loss in (inner, summed(inner)):
        whole = loss(**columns)
        for mine in (first, ~first):
            if mine.any():
                part = loss(**{n: v[mine] for n, v in columns.items()})
                assert torch.allclose(part.values, whole.values[mine], atol=1e-12)


def test_sequence_level_kl_in_the_loss_is_that_in_the_reward() -> None:
    """On policy, k2 of whole completions has the gradient that k1 in the reward gives; a token-level k2 has another."""
    columns = tokens([(3, 1.0), (1, -0.5), (5, 0.2)], seed=3)
    reference = columns["logps"] + torch.linspace(-1, 1, 9, dtype=torch.float64)
    kl = torch.stack([(columns["logps"] - reference)[columns["completion"] == n].sum() for n in range(3)])
    charged = columns["advantage"] - 0.4 * kl.repeat_interleave(torch.tensor([3, 1, 5]))

    def slope(loss: Any, **changed: torch.Tensor) -> torch.Tensor:
        logps = columns["logps"].clone().requires_grad_()
        terms = loss(**{**columns, "logps": logps, **changed})
        return torch.autograd.grad((terms.values * terms.weights).sum(), logps)[0]

    reinforce = policy_losses.get("reinforce")
    in_reward = slope(summed(reinforce), advantage=charged)
    in_loss, apart = (slope(summed(with_divergence(reinforce, 0.4, "k2", level=level)), reference=reference) for level in ("sequence", "token"))  # type: ignore[arg-type]  # fmt: skip
    assert torch.allclose(in_loss, in_reward, atol=1e-12) and not torch.allclose(apart, in_reward, atol=0.1)
    drawn = torch.tensor([0.0, 0.0, 3.0]).repeat_interleave(torch.tensor([3, 1, 5]))
    one = slope(summed(with_divergence(reinforce, 0.4, "k2")), reference=reference, drawn=drawn)
    none = slope(summed(reinforce))
    assert torch.equal(one[:4], none[:4]) and torch.allclose(one[4:] - none[4:], 3 * (apart - none)[4:])
    with pytest.raises(ValueError, match="k3 of a whole"):
        with_divergence(reinforce, 0.1, "k3", level="sequence")


def test_without_old_the_ratio_is_one_and_the_gradient_that_of_the_likelihood() -> None:
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.0])
    terms = grpo(logps, torch.ones(3), advantage)
    assert terms.values.tolist() == [-2.0, 1.0, 0.0]
    terms.values.sum().backward()  # type: ignore[no-untyped-call]
    assert logps.grad is not None and torch.equal(logps.grad, -advantage)


def test_estimates_of_the_divergence_against_the_exact_one() -> None:
    """On samples of the policy k1 and k3 have the KL as their mean; k2's gradient is the KL's."""
    torch.manual_seed(0)
    policy = torch.randn(40, dtype=torch.float64).requires_grad_()
    reference = (policy.detach() + 0.3 * torch.randn(40, dtype=torch.float64)).log_softmax(-1)
    p = policy.log_softmax(-1)
    exact = (p.exp() * (p - reference)).sum()
    weight = p.exp().detach()
    for kind in ("k1", "k3"):
        assert float((weight * divergence(p, reference, kind)).sum().detach()) == pytest.approx(exact.item(), rel=1e-9)  # type: ignore[arg-type]
    slope = torch.autograd.grad(exact, policy, retain_graph=True)[0]
    assert torch.allclose(
        torch.autograd.grad((weight * divergence(p, reference, "k2")).sum(), policy, retain_graph=True)[0], slope
    )
    terms = [with_divergence(grpo, 1.0, "k3", corrected=c)(p, weight, reference=reference, advantage=p.detach() * 0) for c in (True, False)]  # fmt: skip
    corrected, plain = (torch.autograd.grad((weight * t.values).sum(), policy, retain_graph=True)[0] for t in terms)
    assert torch.allclose(corrected, slope) and not torch.allclose(plain, slope, rtol=0.05)
    none = torch.autograd.grad((weight * divergence(p, reference, "k1")).sum(), policy)[0]
    assert none.abs().max() < 1e-12, "k1 in the loss pulls nowhere"
    with pytest.raises(ValueError, match="k1"):
        with_divergence(grpo, 0.1, "k1")
