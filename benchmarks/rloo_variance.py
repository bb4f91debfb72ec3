"""The variance of RLOO's gradient estimate for k = 2, 4, 10 completions a prompt, beside what theory says it is.

    python benchmarks/rloo_variance.py [--samples 20000] [--prompts 3]

A model of some thousand parameters with random weights answers fixed prompts in up to 4 tokens of 6. It has so few
completions that all can be enumerated, so what theory says is exact. The reward is the share of even tokens. Groups are
sampled many times; the gradient of each is what the loss, the advantage and the averaging of `algorithm: rloo` give, and
«variance» is the trace of its covariance over groups.

Theory. Of one prompt, y₁ … y_k are independent samples of the policy, Rᵢ their rewards, sᵢ = ∇ log p(yᵢ) their scores, so
that E s = 0. With μ = E R, σ² = Var R, S = E|s|², a = (R − μ)·s, g = E a (the true gradient) and V = E|a|² − |g|²,

    ĝ = 1/k Σᵢ (Rᵢ − mean of the other Rⱼ)·sᵢ = 1/(k(k−1)) Σ_{i<j} (Rᵢ − Rⱼ)(sᵢ − sⱼ)

is the sample covariance of reward and score: unbiased, a U-statistic of order 2, whose variance is (Hoeffding 1948)

    Var ĝ = V/k + (σ²·S + |g|²)/(k(k−1))                                                       (1)

exactly. The first term is that of REINFORCE with the best constant baseline μ known; the second is the price of estimating
the baseline from k − 1 others, and is gone faster. If reward and score are independent, V = σ²·S, g = 0 and (1) is

    Var ĝ = σ²·S/(k−1)                                                                         (2)

GRPO's group mean (undivided) gives (k−1)/k times RLOO's gradient, thus ((k−1)/k)² times its variance, and a bias; no
baseline at all gives (E|R·s|² − |g|²)/k. Nothing is assumed beyond independent samples of the policy that is trained.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temper.advantages import leave_one_out
from temper.losses import policy_losses, summed
from temper.models.scores import Policy
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.trees import Row, group, join

SIZES = (2, 4, 10)
PROMPTS = [[2, 3, 4], [5], [4, 4, 2, 3]]
VOCABULARY, END, LONGEST = 6, 1, 4


class NoTokenizer:
    """Nothing is decoded to text here."""

    pad_token_id = 0


def model() -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config).eval())


def reward(ids: Sequence[int]) -> float:
    return sum(i % 2 == 0 for i in ids) / len(ids)


def gradient(policy: Policy, row: Row, advantage: np.ndarray) -> np.ndarray:
    """What `algorithm: rloo` gives for one group."""
    lengths = torch.bincount(row.branch)
    weights = (1 / lengths.float())[row.branch]
    columns = {"advantage": torch.from_numpy(advantage).float()[row.branch], "completion": row.branch.float()}
    terms = summed(policy_losses.get("rloo"))(policy(row), weights, **columns)
    loss = (terms.values * terms.weights).sum() / len(lengths)
    parts = torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad])
    return -torch.cat([p.flatten() for p in parts]).double().numpy()


def every() -> Iterator[tuple[int, ...]]:
    """All completions, with their end token where they have one."""
    others = [t for t in range(VOCABULARY) if t != END]
    for n in range(LONGEST):
        yield from ((*ids, END) for ids in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=LONGEST)


class Exact:
    """What (1) is made of, by enumeration."""

    def __init__(self, policy: Policy, prompt: list[int]) -> None:
        self.place = {ids: n for n, ids in enumerate(every())}
        rows = [join([group(prompt, [ids])]) for ids in self.place]
        self.scores = np.array([gradient(policy, row, np.ones(1)) for row in rows])  # ∇ log p [N, parameters]
        with torch.no_grad():
            p = np.array([float(policy(row).double().sum().exp()) for row in rows])
        self.rewards = np.array([reward(ids) for ids in self.place])
        assert abs(p.sum() - 1) < 1e-5 and np.abs(p @ self.scores).max() < 1e-4, "all of them, and E s = 0"
        mean = p @ self.rewards
        a = (self.rewards - mean)[:, None] * self.scores
        self.gradient = p @ a
        self.length = float(self.gradient @ self.gradient)  # |g|²
        self.product = float(p @ (a**2).sum(1)) - self.length  # V
        self.score = float(p @ (self.scores**2).sum(1))  # S
        self.noise = float(p @ (self.rewards - mean) ** 2)  # σ²
        self.plain = float(p @ ((self.rewards[:, None] * self.scores) ** 2).sum(1)) - self.length

    def rloo(self, k: int) -> float:
        return self.product / k + (self.noise * self.score + self.length) / (k * (k - 1))


def spread(gradients: np.ndarray, mean: np.ndarray) -> tuple[float, float]:
    """Trace of the covariance of [G, parameters] about the true mean, and its standard error."""
    squares = ((gradients - mean) ** 2).sum(1)
    return float(squares.mean()), float(squares.std(ddof=1) / len(squares) ** 0.5)


def measured(policy: Policy, prompt: list[int], exact: Exact, k: int, samples: int, seed: int) -> tuple[float, float]:
    """The variance over samples/k groups, and its standard error."""
    sampler = Sampler(policy.hf, NoTokenizer(), end_ids=[END], slots=512)
    asked = Decoding(max_new_tokens=LONGEST, temperature=1.0)
    [done] = sampler.sample([prompt], asked, completions=samples // k * k, seed=seed, step=k)
    ids = [tuple(c.scored) for c in done]
    of = np.array([exact.place[i] for i in ids]).reshape(-1, k)
    rewards = exact.rewards[of]
    advantage = leave_one_out(rewards).advantage(rewards)
    estimates = np.einsum("gk,gkp->gp", advantage, exact.scores[of]) / k
    for n in range(20):  # the loss is linear in the scores; that it is, is tried on some groups
        row = join([group(prompt, ids[n * k : n * k + k])])
        assert np.allclose(gradient(policy, row, advantage[n]), estimates[n], atol=1e-5)
    return spread(estimates, exact.gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="completions for each k, in groups of k")
    parser.add_argument("--prompts", type=int, default=3, help=f"how many of the {len(PROMPTS)} prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, policy = time.perf_counter(), model()
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(list(every()))} completions")
    print("prompt   k   measured variance    theory (1)   measured/theory   if independent (2)   no baseline")
    for p, prompt in enumerate(PROMPTS[: options.prompts]):
        exact = Exact(policy, prompt)
        for k in SIZES:
            found, error = measured(policy, prompt, exact, k, options.samples, seed=p)
            theory, independent = exact.rloo(k), exact.noise * exact.score / (k - 1)
            print(
                f"{p + 1:>6}  {k:>2}   {found:>8.4f} ± {error:.4f}   {theory:>11.4f}   {found / theory:>7.3f} ± {error / theory:.3f}"
                f"   {independent:>18.4f}   {exact.plain / k:>11.4f}"
            )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
