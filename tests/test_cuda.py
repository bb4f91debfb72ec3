"""What only a graphics card can show: trees by compiled blocks, samples, resumption and half precision, with deterministic
algorithms on, as every run has them. Skipped without a card; flash-attn is never needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.engine import device as devices
from temper.losses import Terms, nll
from temper.models import flex
from temper.models.proof import prove
from temper.models.scores import Policy
from temper.rollouts import distribution
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.trees import Node, Row, flatten, group, join, stack
from test_loop import Made, equal, examples, made, weights  # noqa: F401  made is a fixture
from tiny_models import TREES, VOCABULARY, build

DEVICE = torch.device("cuda")
FAMILIES = ["llama", "qwen2 mixed", "gemma3", "gpt2", "gpt_neox", "mixtral"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    devices.setup(str(DEVICE), None)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16 dimensions, the fewest that compiled kernels take."""
    for family in FAMILIES:
        kind, settings = TREES[family]
        size = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64}
        if "head_dim" in settings:
            size |= {"head_dim": 16, "query_pre_attn_scalar": 16}
        monkeypatch.setitem(TREES, family, (kind, {**settings, **size}))


def forest() -> Row:
    """Two lanes of trees, paths beyond the window and trees beyond a block."""
    draw = torch.Generator().manual_seed(7)

    def node(n: int, *children: Node) -> Node:
        return Node(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist(), [1.0] * n, children)

    deep, wide = node(40, node(9, node(5), node(30)), node(26)), node(20, node(44), node(12), node(61))
    return stack([[flatten(deep), flatten(node(7))], [flatten(wide)]]).to(DEVICE)


def scored(policy: Policy, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of their sum."""
    logps = policy(row)
    wanted = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(logps.sum(), wanted, allow_unused=True)
    return logps.detach(), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_trees_equal_padded_sequences(family: str, recomputed: bool, wide: None) -> None:
    """By blocks, by dense masks, and with activations computed again in the backward pass."""
    hf: Any = build(family).to(DEVICE)  # type: ignore[arg-type]
    policy, row = Policy(hf), forest()
    assert prove(policy)["layout"] == "tree"
    pieces = policy.segments
    if recomputed:
        policy.train()
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.layout = "padded"
    expected, slope = scored(policy, row)
    policy.layout = "tree"
    for policy.segments in {pieces, False}:
        logps, gradient = scored(policy, row)
        assert (logps - expected).abs().max() < 1e-3
        assert (gradient - slope).norm() < 1e-3 * slope.norm()
        again = scored(policy, row)
        assert torch.equal(again[0], logps) and torch.equal(again[1], gradient), "the same numbers every time"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < flex.CAPABLE, reason="an older card"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_what_is_used(dtype: torch.dtype, wide: None) -> None:
    hf = build("llama").to(dtype)  # type: ignore[arg-type]
    policy = Policy(hf.to(DEVICE))  # type: ignore[arg-type]
    assert flex.refused(hf.config, DEVICE, dtype) is None
    prove(policy)
    assert policy.attention == "flex_attention"


def test_half_precision_is_close(wide: None) -> None:
    policy, row = Policy(build("llama").to(DEVICE)), forest()  # type: ignore[arg-type]
    prove(policy)
    expected = policy(row).detach()
    with devices.autocast(DEVICE, "bf16"):
        found = policy(row).detach()
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 < expected.std()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.2}])
def test_samples_have_the_probabilities_that_they_are_scored_with(family: str, settings: dict[str, Any]) -> None:
    hf: Any = build(family).to(DEVICE)  # type: ignore[arg-type]
    sampler = Sampler(hf, None, end_ids=[], slots=4)
    assert sampler.layout == "native", sampler.reason
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22], [30]]
    decoding = Decoding(max_new_tokens=12, temperature=1.0, **settings)
    answers = sampler.sample(prompts, decoding, completions=3, seed=1)
    row = join([group(p, [c.ids for c in cs]) for p, cs in zip(prompts, answers, strict=True)]).to(DEVICE)
    with torch.no_grad():
        expected = Policy(hf, "padded")(row).cpu()
    got = torch.cat([torch.as_tensor(c.raw) for cs in answers for c in cs])
    assert (got - expected).abs().max() < 1e-3
    assert [[c.ids for c in cs] for cs in sampler.sample(prompts, decoding, completions=3, seed=1)] == [
        [c.ids for c in cs] for cs in answers
    ]


def test_what_is_drawn_here_is_drawn_on_a_processor() -> None:
    """The same logits and noise: running sums by products choose the tokens that `cumsum` chooses."""
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 5003, generator=draw)
    noise = torch.rand(64, generator=draw, dtype=torch.float64)
    for decoding in (Decoding(temperature=1.0), Decoding(temperature=0.8, top_p=0.9)):
        expected = distribution.draw(logits, noise, decoding)
        found = distribution.draw(logits.to(DEVICE), noise.to(DEVICE), decoding)
        assert (found[0].cpu() == expected[0]).float().mean() > 0.98, "but for ties within rounding"
        same = found[0].cpu() == expected[0]
        assert (found[2].cpu() - expected[2])[same].abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(made: Made, tmp_path: Path, precision: str) -> None:  # noqa: F811
    fields = {"batch_size": 4, "max_steps": 6, "checkpoint_every": 2, "lr": 0.01, "precision": precision}

    def model() -> Any:
        hf = build("llama").to(DEVICE)  # type: ignore[arg-type]
        hf.train()
        return hf

    whole = made(fields, model=model(), trees=examples(24))
    whole.run()
    passes = 0

    def until_killed(logps: torch.Tensor, w: torch.Tensor) -> Terms:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise KeyboardInterrupt
        return nll(logps, w)

    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        made(fields, model=model(), trees=examples(24), folder=folder, loss=until_killed).run()
    resumed = made(fields, model=model(), trees=examples(24), folder=folder)
    resumed.run()
    assert not equal(weights(Policy(model())), weights(resumed.policy)), "it trained"
    assert equal(weights(whole.policy), weights(resumed.policy))
