"""Policy losses, KL estimates and advantages: by hand, against float64, and against TRL's GRPOTrainer on one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from temper.advantages import group, without_variance
from temper.losses import divergence, grpo, with_divergence
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
    out = []
    for p, prompt in enumerate(PROMPTS):
        nodes = [
            Node(c, [1 / len(c) if average == "sequence" else 1.0] * len(c)) for c in COMPLETIONS[p]
        ]  # fmt: skip
        extra = {name: np.concatenate(values[p]).astype(np.float32) for name, values in columns.items()}
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
    advantage = group(REWARDS)
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


def trl_trainer(model: Any, folder: Path, **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    arguments = trl.GRPOConfig(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=LONGEST,
        report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model, args=arguments, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w5 w6", "w7"]}),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss_type", "average"), [("grpo", "sequence"), ("bnpo", "token")])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_value_and_gradient_equal_trl(tmp_path: Path, loss_type: str, average: str, beta: float) -> None:
    model = build("llama").float()
    found = columns(model)
    trainer = trl_trainer(model, tmp_path, loss_type=loss_type, beta=0.0, epsilon=0.2, epsilon_high=0.28, delta=1.6)
    prompt_width = max(map(len, PROMPTS))
    lines = [(p, c) for p, cs in zip(PROMPTS, COMPLETIONS, strict=True) for c in cs]
    batch = {
        "prompt_ids": torch.tensor([[0] * (prompt_width - len(p)) + p for p, _ in lines]),
        "prompt_mask": torch.tensor([[0] * (prompt_width - len(p)) + [1] * len(p) for p, _ in lines]),
        "completion_ids": torch.tensor([c + [0] * (LONGEST - len(c)) for _, c in lines]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (LONGEST - len(c)) for _, c in lines]),
        "advantages": torch.tensor(group(REWARDS).reshape(-1), dtype=torch.float32),
        "old_per_token_logps": padded(found["old"]),
        "ref_per_token_logps": padded(found["reference"]),
    }
    trainer.beta = beta  # set afterwards: with one from the start the trainer loads a reference model of its own
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    model.zero_grad()
    expected = trainer._compute_loss(model, batch)
    expected.backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def loss(logps: torch.Tensor, w: torch.Tensor, *, reference: torch.Tensor, **rest: torch.Tensor) -> Any:
        inner = lambda a, b, **c: grpo(a, b, epsilon=0.2, epsilon_high=0.28, delta=1.6, **c)  # noqa: E731
        return (
            with_divergence(inner, beta, "k3")(logps, w, reference=reference, **rest)
            if beta
            else inner(logps, w, **rest)
        )

    for micro in (16, 512):
        value, gradient = ours(model, average, found, loss, micro)
        assert value == pytest.approx(expected.item(), abs=1e-5)
        assert gradient.keys() == slopes.keys()
        whole = torch.cat([s.flatten() for s in slopes.values()]).norm()
        apart = torch.cat([(gradient[n] - s).flatten() for n, s in slopes.items()]).norm()
        assert apart / whole < 1e-5
    flat = {n: torch.from_numpy(np.concatenate([v for row in rows for v in row])) for n, rows in found.items()}
    terms = grpo(flat["reference"], torch.ones(35), flat["advantage"], flat["old"])
    assert 0 < float(terms.extras["clipped"].mean()) < 1, "the batch exercises the clipping"


def test_advantages_equal_trls_formula_in_float64() -> None:
    rewards = torch.tensor(REWARDS)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert np.allclose(group(REWARDS), expected.numpy(), atol=1e-12)
    assert np.allclose(
        group(REWARDS, scale="batch"), ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).numpy()
    )
    assert np.allclose(group(REWARDS + 3, scale="none"), group(REWARDS, scale="none")), "a constant changes nothing"


def test_a_reward_that_is_missing_takes_no_part() -> None:
    found = group(np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, np.nan], [np.nan, 2.0, np.nan]]), scale="none")
    assert found.tolist() == [[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert without_variance(np.array([[1.0, np.nan, 0.0], [np.nan] * 3, [np.nan, 2.0, np.nan]])).tolist() == [
        False,
        True,
        True,
    ]


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
