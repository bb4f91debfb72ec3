"""Preference losses: by hand in float64, against TRL's trainers on one batch, and what all of them keep to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from temper import fields
from temper.errors import RecipeError
from temper.losses import COUPLED, REFERENCE_FREE, Compared, kto_loss, mixture, preference_losses, unpaired
from temper.losses.mixtures import parts_of
from tiny_models import VOCABULARY, build

EVERY = list(preference_losses)
ALONE = {name: {"delta": 0.0} if name == "bco_pair" else {} for name in EVERY}  # options that leave out other pairs


def drawn(n: int, seed: int = 0, spread: float = 3.0) -> Compared:
    """Pairs whose log-ratios are of either sign and of every size that training meets."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (2, n), generator=g).double()
    policy = -lengths * (0.5 + torch.rand(2, n, generator=g, dtype=torch.float64))
    reference = policy + spread * torch.randn(2, n, generator=g, dtype=torch.float64)
    return Compared(*policy.requires_grad_(), *reference.clamp(max=-0.1).detach(), *lengths)


def slopes(values: torch.Tensor, pairs: Compared) -> torch.Tensor:
    """d Σ values / d (chosen, rejected), [2, P]."""
    found = torch.autograd.grad(values.sum(), [pairs.chosen, pairs.rejected], allow_unused=True)
    return torch.stack([torch.zeros_like(pairs.chosen) if g is None else g for g in found])


# By hand: each loss once more, in plain Python, as its paper's equation reads


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ln(x: float) -> float:
    return math.log(x)


def odds(p: float) -> float:
    return p / (1 - p)


B, E = 0.4, 0.2  # β and ε of the cases below
# c, r: log-probabilities; a, b: log-ratios to the reference; m, n: lengths
Hand = Callable[[float, float, float, float, float, float], float]
HAND: dict[str, tuple[dict[str, Any], Hand]] = {
    "sigmoid": ({"beta": B, "label_smoothing": E}, lambda c, r, a, b, m, n: -0.8 * ln(s(B * (a - b))) - 0.2 * ln(s(B * (b - a)))),
    "robust": ({"beta": B, "label_smoothing": E}, lambda c, r, a, b, m, n: (-0.8 * ln(s(B * (a - b))) + 0.2 * ln(s(B * (b - a)))) / 0.6),
    "hinge": ({"beta": B}, lambda c, r, a, b, m, n: max(0.0, 1 - B * (a - b))),
    "ipo": ({"beta": B}, lambda c, r, a, b, m, n: (a / m - b / n - 1.25) ** 2),
    "exo_pair": (
        {"beta": B, "label_smoothing": E},
        lambda c, r, a, b, m, n: s(B * (a - b)) * ln(s(B * (a - b)) / 0.8) + s(B * (b - a)) * ln(s(B * (b - a)) / 0.2),
    ),
    "nca_pair": ({"beta": B}, lambda c, r, a, b, m, n: -ln(s(B * a)) - 0.5 * ln(s(-B * a)) - 0.5 * ln(s(-B * b))),
    "bco_pair": ({"beta": B, "delta": 0.3}, lambda c, r, a, b, m, n: -ln(s(B * a - 0.3)) - ln(s(0.3 - B * b))),
    "sppo_hard": ({"beta": B}, lambda c, r, a, b, m, n: (a - 2.5 * 0.5) ** 2 + (b + 2.5 * 0.5) ** 2),
    "apo_zero": ({"beta": B}, lambda c, r, a, b, m, n: 1 - s(B * a) + s(B * b)),
    "apo_down": ({"beta": B}, lambda c, r, a, b, m, n: s(B * a) + 1 - s(B * (a - b))),
    "discopop": (
        {"beta": B, "tau": 0.5},
        lambda c, r, a, b, m, n: (1 - s(B * (a - b) / 0.5)) * -ln(s(B * (a - b))) + s(B * (a - b) / 0.5) * math.exp(B * (b - a)),
    ),
    "sigmoid_norm": ({"beta": B}, lambda c, r, a, b, m, n: -ln(s(B * (a / m - b / n)))),
    "sft": ({}, lambda c, r, a, b, m, n: -c / m),
    "simpo": ({"beta": B, "gamma": 0.7}, lambda c, r, a, b, m, n: -ln(s(B * c / m - B * r / n - 0.7))),
    "orpo": ({"beta": B}, lambda c, r, a, b, m, n: -c / m - B * ln(s(ln(odds(math.exp(c / m)) / odds(math.exp(r / n)))))),
    "cpo": ({"beta": B, "alpha": 0.6}, lambda c, r, a, b, m, n: -ln(s(B * (c - r))) - 0.6 * c / m),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_values_and_gradients_equal_the_papers_equation(name: str) -> None:
    options, hand = HAND[name]
    pairs = drawn(12)
    values = preference_losses.get(name)(pairs, **options)
    found = slopes(values, pairs)
    columns = [t.tolist() for t in (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_length, pairs.rejected_length)]  # fmt: skip
    for k, (c, r, rc, rr, m, n) in enumerate(zip(*columns, strict=True)):

        def at(x: float, y: float, rest: tuple[float, ...] = (rc, rr, m, n)) -> float:
            return hand(x, y, x - rest[0], y - rest[1], rest[2], rest[3])

        step = 1e-5
        assert values[k].item() == pytest.approx(at(c, r), abs=1e-10)
        assert found[0, k].item() == pytest.approx((at(c + step, r) - at(c - step, r)) / (2 * step), abs=1e-7)
        assert found[1, k].item() == pytest.approx((at(c, r + step) - at(c, r - step)) / (2 * step), abs=1e-7)


def test_ranked_losses_compare_quantiles() -> None:
    pairs = drawn(9)
    c, r, rc, rr = (t.tolist() for t in (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected))
    for name, left, right in (
        ("aot", [x - y for x, y in zip(c, r, strict=True)], [x - y for x, y in zip(rc, rr, strict=True)]),
        ("aot_unpaired", [x - y for x, y in zip(c, rc, strict=True)], [x - y for x, y in zip(r, rr, strict=True)]),
    ):
        values = preference_losses.get(name)(pairs, beta=B, label_smoothing=E).tolist()
        ranked = {x: B * (x - y) for x, y in zip(sorted(left), sorted(right), strict=True)}
        assert values == pytest.approx([-0.8 * ln(s(ranked[x])) - 0.2 * ln(s(-ranked[x])) for x in left], abs=1e-10)
    assert set(EVERY) == {*HAND, "aot", "aot_unpaired"}, "every loss is worked by hand"


def test_bcos_delta_is_the_mean_of_both_sides_and_has_no_gradient() -> None:
    pairs = drawn(5)
    loss = preference_losses.get("bco_pair")
    delta = B * (sum(pairs.chosen_ratio.tolist()) + sum(pairs.rejected_ratio.tolist())) / 10
    found, fixed = loss(pairs, beta=B), loss(pairs, beta=B, delta=delta)
    torch.testing.assert_close(found, fixed)
    torch.testing.assert_close(slopes(found, pairs), slopes(fixed, pairs))


# What every loss keeps to


@pytest.mark.parametrize("name", EVERY)
def test_a_first_step_moves_the_chosen_answer_ahead_of_the_rejected_one(name: str) -> None:
    """At the reference, answers of one length: the margin grows along the negative gradient.

    Not under DiscoPOP, whose gradient in h is (1 − ln 2)/4τ − 3/4 there: with the paper's τ the first steps go astray.
    """
    policy = torch.tensor([[-4.0, -3.0], [-4.0, -5.0]], requires_grad=True)
    pairs = Compared(*policy, *policy.detach(), *torch.full((2, 2), 4.0))
    chosen, rejected = slopes(preference_losses.get(name)(pairs), pairs)
    assert bool((rejected - chosen > 0).all()) is (name != "discopop")
    if name == "discopop":
        assert chosen.tolist() == pytest.approx([0.05 * ((1 - math.log(2)) / (4 * 0.05) - 0.75)] * 2)


@pytest.mark.parametrize("name", EVERY)
def test_the_sets_say_what_a_value_depends_on(name: str) -> None:
    pairs = drawn(7)
    loss = preference_losses.get(name)
    values = loss(pairs)
    first = Compared(*(getattr(pairs, f)[:1] for f in Compared.__dataclass_fields__))
    assert torch.equal(loss(first), values[:1]) is (name not in COUPLED)
    moved = Compared(pairs.chosen, pairs.rejected, pairs.ref_chosen + 1, pairs.ref_rejected * 2, pairs.chosen_length, pairs.rejected_length)  # fmt: skip
    assert torch.equal(loss(moved), values) is (name in REFERENCE_FREE)
    assert not COUPLED - {*EVERY, "kto"} and not REFERENCE_FREE - {*EVERY}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("far", [-1e4, -300.0, 0.0, 300.0, 1e4])
def test_values_and_gradients_stay_numbers_far_from_the_reference(name: str, far: float) -> None:
    """In float32: a pair whose log-ratio is larger than an exponent can be; and probabilities of 1."""
    policy = torch.tensor([[min(far, 0.0), 0.0], [min(-far, 0.0), 0.0]], requires_grad=True)
    pairs = Compared(policy[0], policy[1], torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2))
    values = preference_losses.get(name)(pairs, **({"beta": 0.1} | ALONE[name] if name != "sft" else {}))
    assert bool(values.isfinite().all() and slopes(values, pairs).isfinite().all())


def test_six_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one in each tensor"):
        Compared(*[torch.zeros(3)] * 5, torch.zeros(1))
    with pytest.raises(ValueError, match="one in each tensor"):
        Compared(*torch.zeros(6, 3, 2))
    with pytest.raises(ValueError, match="one z0"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.ones(2).bool(), torch.zeros(2))


# As a recipe writes them


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    pairs = drawn(6)
    mix = mixture([{"sigmoid": {"beta": 0.3}, "weight": 0.8}, {"bco_pair": {"delta": 0}, "weight": 0.2}, "sft"])
    by_hand = (
        0.8 * preference_losses.get("sigmoid")(pairs, beta=0.3)
        + 0.2 * preference_losses.get("bco_pair")(pairs, delta=0.0)
        + preference_losses.get("sft")(pairs)
    )
    torch.testing.assert_close(mix(pairs), by_hand)
    torch.testing.assert_close(slopes(mix(pairs), pairs), slopes(by_hand, pairs))
    assert not mix.coupled and not mix.reference_free
    assert mixture(["simpo", "sft"]).reference_free and mixture(["sigmoid", "bco_pair"]).coupled
    assert torch.equal(mixture("sigmoid")(pairs), mixture({"sigmoid": None})(pairs))
    assert mixture("ipo").parts[0].options == {"beta": 0.1}


def test_a_loss_of_single_answers_is_bound_apart() -> None:
    loss = unpaired({"kto": {"beta": 0.5, "undesirable_weight": 2}})
    assert loss is not None and unpaired("sigmoid") is None
    values = loss(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([False]), torch.tensor(0.2))
    assert values.tolist() == pytest.approx([2 * (1 - s(0.5 * (0.2 - 1)))])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sigmod", "no preference loss «sigmod».*did you mean «sigmoid»"),
        ("dpo", "DPO's loss is called «sigmoid»"),
        ("ktoo", "did you mean «kto»"),
        ({"sigmoid": {"betta": 1}}, "no option «betta».*did you mean «beta»"),
        ({"sigmoid": {"beta": 0}}, "beta = 0 does not fit.*number, > 0"),
        ({"robust": {"label_smoothing": 0.5}}, "label_smoothing = 0.5 does not fit.*≥ 0, < 0.5"),
        ({"exo_pair": {"label_smoothing": 0}}, "label_smoothing = 0 does not fit"),
        ({"bco_pair": {"delta": "rolling"}}, "delta = 'rolling' does not fit.*number or batch"),
        ({"sigmoid": {}, "beta": 0.1}, "unknown key «beta» beside.*options stand within the loss: {sigmoid: {beta"),
        ({"sigmoid": {}, "wieght": 0.1}, "unknown key «wieght» beside.*did you mean «weight»"),
        ({"sigmoid": {}, "sft": {}}, "is not a loss.*a list of"),
        ({"sigmoid": 0.1}, "is not a loss"),
        (3, "3 is not a loss"),
        ([], "empty"),
        (["sft", "sft"], "stands twice"),
        ([{"sft": {}, "weight": -1}], "weight = -1 does not fit"),
        ([{"sft": {}, "weight": True}], "weight = True does not fit"),
        (["kto", "sft"], "stands alone"),
        ("kto", "takes rows with a label"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told(spec: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){says}") as told:
        mixture(spec, where="stages.dpo.loss")
    assert "stages.dpo.loss" in str(told.value)


def test_the_list_and_the_explanations_know_them() -> None:
    listed = fields.catalogue()
    assert set(listed["preference_losses"]) == set(EVERY) and "kto" in listed["unpaired_losses"]
    assert "tau (number, > 0; default 0.05): how sharply" in fields.explain("discopop")
    for name in EVERY:
        explained = fields._thing(preference_losses, name)
        assert explained.count("): ") == len(preference_losses.options(name)), f"{name}: an option without a word"
    assert parts_of("kto")[0].options == {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}


# Against TRL: its own trainers, a model of random weights, one batch

PROMPT = [7]  # of one token: TRL's ORPO takes the likelihood of the prompt in as well, and the first token has none
LENGTHS = [(6, 3), (2, 5), (4, 4), (7, 2), (3, 6)]  # of the chosen and rejected answers
WIDTH = len(PROMPT) + 7


def answers(side: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(side)
    return [torch.randint(3, VOCABULARY, (both[side],), generator=g).tolist() for both in LENGTHS]


CHOSEN, REJECTED = answers(0), answers(1)
NOISE = 2.0 * torch.randn(2, len(LENGTHS), generator=torch.Generator().manual_seed(5))


def padded(lines: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompt and answer, padded on the right, as DPOTrainer and KTOTrainer take them."""
    return {
        "input_ids": torch.tensor([PROMPT + a + [0] * (WIDTH - 1 - len(a)) for a in lines]),
        "attention_mask": torch.tensor([[1] * (1 + len(a)) + [0] * (WIDTH - 1 - len(a)) for a in lines]),
        "completion_mask": torch.tensor([[0] + [1] * len(a) + [0] * (WIDTH - 1 - len(a)) for a in lines]),
    }


def totals(model: Any, lines: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the answers [N], one plain forward pass each, nothing padded."""
    found = []
    for a in lines:
        logps = model(torch.tensor([PROMPT + a])).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, torch.tensor(a)[:, None]).sum())
    return torch.stack(found)


def compared(model: Any, reference: bool = True) -> Compared:
    chosen, rejected = totals(model, CHOSEN), totals(model, REJECTED)
    ref = torch.stack([chosen, rejected]).detach() + NOISE if reference else torch.zeros_like(NOISE)
    return Compared(chosen, rejected, *ref, *torch.tensor(LENGTHS).float().T)


def of_weights(loss: torch.Tensor, model: Any) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(ours: torch.Tensor, theirs: torch.Tensor, model: Any) -> None:
    """One value, and one gradient in every weight of the model."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    expected = of_weights(theirs, model)
    apart = of_weights(ours, model) - expected
    assert float(expected.norm()) > 1e-4 and float(apart.norm() / expected.norm()) < 2e-5


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """TRL's trainers by name, each built once on the model that it brings with it as `model`."""
    trl = pytest.importorskip("trl")
    made: dict[str, Any] = {}

    def trainer(kind: str) -> Any:
        if kind not in made:
            made[kind] = built(trl, kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return trainer


def built(trl: Any, kind: str, folder: Path) -> Any:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental import cpo, orpo

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")
    home = {"CPO": cpo, "ORPO": orpo}.get(kind, trl)
    arguments = getattr(home, f"{kind}Config")(
        output_dir=str(folder), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False
    )
    if kind == "CPO":
        arguments.loss_type = "simpo"  # so that the trainer has a γ
    rows = {"prompt": ["w5 w6", "w7 w8"], "chosen": ["w8", "w9"], "rejected": ["w9", "w10"]}
    if kind == "KTO":
        rows = {"prompt": rows["prompt"], "completion": rows["chosen"], "label": [True, False]}
    reference = {} if kind in ("CPO", "ORPO") else {"ref_model": build("llama").float()}
    return getattr(home, f"{kind}Trainer")(
        model=build("llama").float(), args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(rows), **reference,
    )  # fmt: skip


def dpo(trainer: Any, **settings: Any) -> torch.Tensor:
    """DPOTrainer's loss of the batch, the reference's log-probabilities given as if computed before."""
    model = trainer.model
    trainer.precompute_ref_logps = True
    trainer.loss_weights = settings.pop("weights", [1.0])
    trainer.args.discopop_tau = settings.pop("tau", 0.05)
    trainer.label_smoothing = settings.pop("label_smoothing", 0.0)
    trainer.loss_types, trainer.beta = settings.pop("types"), settings.pop("beta")
    assert not settings
    pairs = compared(model)
    batch = padded(CHOSEN + REJECTED) | {"ref_chosen_logps": pairs.ref_chosen, "ref_rejected_logps": pairs.ref_rejected}
    return trainer._compute_loss(model, batch, False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {}),
        ("robust", {"label_smoothing": 0.2}),
        ("hinge", {}),
        ("ipo", {}),
        ("exo_pair", {"label_smoothing": 0.01}),
        ("nca_pair", {}),
        ("bco_pair", {"delta": 0.0}),
        ("sppo_hard", {}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {"label_smoothing": 0.1}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {"tau": 0.3}),
        ("sigmoid_norm", {}),
    ],
)
def test_value_and_gradient_equal_trls_dpo(trainers: Callable[[str], Any], name: str, options: dict[str, Any]) -> None:
    trainer = trainers("DPO")
    for beta in (0.1, 0.7):
        theirs = dpo(trainer, types=[name], beta=beta, **{k: v for k, v in options.items() if k != "delta"})
        ours = preference_losses.get(name)(compared(trainer.model), beta=beta, **options).mean()
        same(ours, theirs, trainer.model)


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_equals_trls_and_its_sft_counts_tokens(trainers: Callable[[str], Any]) -> None:
    trainer = trainers("DPO")
    mix = mixture([{"sigmoid": {"beta": 0.2}, "weight": 0.8}, {"bco_pair": {"beta": 0.2, "delta": 0}, "weight": 0.2}])
    theirs = dpo(trainer, types=["sigmoid", "bco_pair"], weights=[0.8, 0.2], beta=0.2)
    same(mix(compared(trainer.model)).mean(), theirs, trainer.model)
    # TRL's sft is the mean over tokens: ours, each pair weighted with its length, is the same
    pairs = compared(trainer.model)
    weighted = (mixture("sft")(pairs) * pairs.chosen_length).sum() / pairs.chosen_length.sum()
    theirs = dpo(trainer, types=["sft"], beta=0.1)
    assert abs(mixture("sft")(pairs).mean().item() - theirs.item()) > 1e-3
    same(weighted, theirs, trainer.model)


@pytest.mark.filterwarnings("ignore")
def test_discopop_far_on_the_wrong_side_is_a_number_where_trls_is_none(trainers: Callable[[str], Any]) -> None:
    trainer = trainers("DPO")
    pairs = compared(trainer.model)
    assert float((100 * pairs.margin).min().detach()) < -89
    assert math.isnan(dpo(trainer, types=["discopop"], beta=100.0).item())
    values = preference_losses.get("discopop")(pairs, beta=100.0)
    assert bool(values.isfinite().all()) and bool(slopes(values, pairs).isfinite().all())


def one_pair(k: int) -> dict[str, torch.Tensor]:
    """A batch of one pair as CPOTrainer and ORPOTrainer take it: their likelihood is a mean over the batch's tokens."""
    out = {"prompt_input_ids": torch.tensor([PROMPT]), "prompt_attention_mask": torch.ones(1, 1).long()}
    for side, a in (("chosen", CHOSEN[k]), ("rejected", REJECTED[k])):
        out[f"{side}_input_ids"] = torch.tensor([PROMPT + a])
        out[f"{side}_attention_mask"] = torch.ones(1, 1 + len(a)).long()
        out[f"{side}_labels"] = torch.tensor([[-100, *a]])
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "kind", "theirs"),
    [
        ("sigmoid", {"label_smoothing": 0.2}, "CPO", {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.2}),
        ("cpo", {"alpha": 0.7}, "CPO", {"loss_type": "sigmoid", "cpo_alpha": 0.7, "label_smoothing": 0.0}),
        ("simpo", {"gamma": 0.4}, "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "label_smoothing": 0.0}),
        ("orpo", {}, "ORPO", {}),
    ],
)  # fmt: skip
def test_value_and_gradient_equal_trls_without_a_reference(
    trainers: Callable[[str], Any], name: str, options: dict[str, Any], kind: str, theirs: dict[str, Any]
) -> None:
    trainer = trainers(kind)
    for beta in (0.3, 2.0):
        for key, value in {**theirs, "beta": beta}.items():
            assert hasattr(trainer, key)
            setattr(trainer, key, value)
        for k in (0, 1):
            expected, _ = trainer.get_batch_loss_metrics(trainer.model, one_pair(k))
            ours = preference_losses.get(name)(compared(trainer.model, reference=False), beta=beta, **options)[k]
            same(ours, expected, trainer.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sign", [1.0, -1.0])  # an estimate of the KL above 0, and one below, which counts as 0
def test_value_and_gradient_equal_trls_kto(trainers: Callable[[str], Any], sign: float) -> None:
    trainer = trainers("KTO")
    model = trainer.model
    trainer.precompute_ref_logps, trainer.beta = True, 0.3
    trainer.desirable_weight, trainer.undesirable_weight = 1.3, 0.6
    desirable = torch.tensor([True, False, False, True, True])
    beside = CHOSEN[1:] + CHOSEN[:1]  # the answers of other prompts
    with torch.no_grad():
        reference, ref_beside = totals(model, CHOSEN) + NOISE[0], totals(model, beside) - sign * NOISE[1].abs()
        z0 = (totals(model, beside) - ref_beside).mean().clamp(min=0)
    batch = padded(CHOSEN) | {f"KL_{k}": v for k, v in padded(beside).items()}
    batch |= {"label": desirable, "ref_logps": reference, "ref_KL_logps": ref_beside}
    theirs = trainer._compute_loss(model, batch, False)
    assert (float(z0) > 0) is (sign > 0)
    values = kto_loss(totals(model, CHOSEN), reference, desirable, z0, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)  # fmt: skip
    same(values.mean(), theirs, model)
