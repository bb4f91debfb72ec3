"""Linear layers by oneDNN against float64, forwards and backwards; and heads that keep no logits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.activations import NewGELUActivation

from temper.engine import device
from temper.models import products
from temper.models.products import Halves, added_in_place, own_products, sent, sound
from temper.models.scores import Policy
from temper.rollouts.products import packed_linears
from temper.trees import rounded
from test_scores import compare, forest, three_at_a_time, with_adapter
from tiny_models import build


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 400), (400, 96), (512, 8), (8, 512), (3, 5)])
def test_values_and_gradients_are_those_of_float64(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(2, 33, inputs, requires_grad=True)
    slope = torch.randn(2, 33, outputs)
    with own_products(layer, Halves()):
        assert ("forward" in vars(layer)) == sound(torch.float32)
        got = layer(x)
    assert "forward" not in vars(layer) and got.shape == slope.shape
    found = torch.autograd.grad(got, [x, *layer.parameters()], slope)  # after it, as the backward pass is
    exact, y = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(exact(y), [y, *exact.parameters()], slope.double())
    for a, b in zip([got, *found], [exact(y), *wanted], strict=True):
        assert a.dtype == torch.float32 and float(((a - b).norm() / b.norm()).detach()) < 2e-6


@pytest.fixture
def mkl() -> Iterator[None]:
    """The process as torch has it, and afterwards as it was."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("wanted", [True, False])
def test_products_sent_to_either_library_are_those_of_float64(wanted: bool, mkl: None) -> None:
    torch.manual_seed(0)
    a, b, into = torch.randn(3, 1600, 96), torch.randn(3, 1600, 512), torch.randn(96, 512)
    exact = a.double().transpose(1, 2) @ b.double()
    with sent(wanted):
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == (wanted and products.exact())
        found = a.transpose(1, 2) @ b
        added = into.clone().addmm_(a[0].t(), b[0])
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert far(found, exact) < 2e-6 and far(added, into.double() + exact[0]) < 2e-6


def test_where_products_would_be_rounded_they_stay_torchs(mkl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX: the setting that sends them to oneDNN is leave to compute in bfloat16."""
    monkeypatch.setattr(products, "exact", lambda: False)
    device.setup("cpu", None)
    with sent(True):
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    monkeypatch.undo()
    device.setup("cpu", None)
    assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == products.exact()


def test_rounded_products_are_found_out(mkl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        exact = torch.backends.mkldnn.matmul.fp32_precision == "none" or a.dtype != torch.float32
        return real(a, b) if exact else real(a.bfloat16(), b.bfloat16()).float()

    products.exact.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.exact()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    products.exact.cache_clear()


def test_frozen_weights_have_no_gradient_and_nothing_is_kept_for_them() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(7, 64, requires_grad=True)
    layer.weight.requires_grad_(False)
    with own_products(layer, Halves()):
        layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None


def test_other_precisions_and_replaced_layers_are_left_alone() -> None:
    replaced, halves = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    x = torch.randn(4, 64)
    with own_products(nn.ModuleList([replaced, halves]), Halves()):
        assert replaced(x) is x and halves(x.bfloat16()).dtype == torch.bfloat16
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16), own_products(layer, Halves()):
        assert layer(x).dtype == torch.bfloat16
    with own_products(layer, Halves()):
        assert layer(x.double().float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16  # begun within


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_frozen_head_makes_its_logits_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters, three positions at a time: each is made once and its slope laid by; a trained head makes it again."""
    made = three_at_a_time(monkeypatch)
    row, times = forest(), []
    for model in (with_adapter(build(family)), build(family)):
        compare(model, row, ["tree"])
        made.clear()
        Policy(model)(row).sum().backward()
        assert max(made) == 3
        times.append(sum(made) / rounded(len(row.tgt)))
    assert times == [1, 2]


def adapted(*, bias: bool = True, dora: bool = False) -> nn.Module:
    """A network with two linear layers of one input, under LoRA that is not at its start."""
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down = (nn.Linear(a, b, bias=bias) for a, b in ((256, 320), (256, 192), (512, 64)))  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.cat([self.gate_proj(x), self.up_proj(x)], -1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down"], use_dora=dora)
    model = get_peft_model(Net(), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1)
    return model


def gradients(model: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    asked = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, asked, slope.to(out.dtype))]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_within_its_product_is_pefts_in_float64(bias: bool, halves: bool) -> None:
    """In bfloat16 no further from float64 than PEFT's own layers are."""
    model, x, slope = adapted(bias=bias), torch.randn(2, 33, 256), torch.randn(2, 33, 64)
    exact = gradients(copy.deepcopy(model).double(), x.double(), slope.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        usual = gradients(model, x, slope)
        with own_products(model, Halves()):
            assert "forward" in vars(model.get_submodule("base_model.model.down"))
            got = gradients(model, x, slope)
    assert not any("forward" in vars(m) for m in model.modules())
    for a, b, c in zip(got, usual, exact, strict=True):
        assert a.dtype == b.dtype
        assert far(a, c) < (max(1.3 * far(b, c), 4e-3) if halves else 2e-6)


@pytest.mark.parametrize("case", ["dora", "off", "merged", "two", "dropout"])
def test_lora_that_is_more_than_one_plain_update_is_left_to_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from temper.models import products

    model, x = adapted(dora=case == "dora"), torch.randn(5, 256)
    if case == "two":
        model.add_adapter("second", model.peft_config["default"])  # type: ignore[operator]
        model.base_model.set_adapter(["default", "second"])  # type: ignore[operator]
    for layer in (m for m in model.modules() if hasattr(m, "lora_dropout")):
        if case == "dropout":
            layer.lora_dropout["default"] = nn.Dropout(0.5)  # type: ignore[operator,index]
        if case == "merged":
            layer.merge()  # type: ignore[operator]
        if case == "off":
            layer.enable_adapters(False)  # type: ignore[operator]

    def never(*_: object) -> None:
        raise AssertionError("PEFT's layer was replaced")

    monkeypatch.setattr(products._Adapted, "apply", never)
    found = []
    for within in (False, True):
        torch.manual_seed(1)
        with own_products(model, Halves()) if within else contextlib.nullcontext():
            found.append(model(x))
    assert far(found[1].detach(), found[0].detach()) < 2e-6


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("case", ["active", "off", "dora"])
def test_packed_weights_hold_an_adapters_update(case: str, halves: bool) -> None:
    model, x = adapted(dora=case == "dora").eval(), torch.randn(8, 1, 256)
    if case == "off":
        for layer in (m for m in model.modules() if hasattr(m, "lora_dropout")):
            layer.enable_adapters(False)  # type: ignore[operator]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=halves):
        usual = model(x)
        with packed_linears(model):
            got, again = model(x), model(x)
        assert torch.equal(got, again) and got.dtype == usual.dtype
        assert far(got, usual) < (1e-2 if halves else 2e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(m) for m in model.modules())


def test_layers_packed_as_one_are_right_for_other_inputs_too() -> None:
    """One is asked twice, the other for something else, as the last layer's queries are."""
    model, x, y = adapted().base_model.model, torch.randn(3, 256), torch.randn(2, 256)  # type: ignore[union-attr]
    one, other = model.gate_proj, model.up_proj  # type: ignore[union-attr]
    with torch.no_grad():
        wanted = one(x), one(x), other(y), other(x)  # type: ignore[operator]
        with packed_linears(model):  # type: ignore[arg-type]
            got = one(x), one(x), other(y), other(x)  # type: ignore[operator]
    assert all(far(a, b) < 2e-6 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # qwen2: biases; of gemma2 embeddings and head are one
def test_gradients_added_in_place_are_those_that_torch_adds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, the first into no gradients at all, the head in chunks that are computed again."""
    three_at_a_time(monkeypatch)
    rows, found = [forest(), forest()], []
    for how in (contextlib.nullcontext, added_in_place):
        model = build(family)
        for row in rows:
            total = Policy(model)(row).sum()
            with how():
                total.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, wanted in found[0].items():
        got = found[1][name]
        assert (wanted is None) == (got is None), name
        assert wanted is None or got is None or far(got, wanted) < 2e-6, name
        assert got is None or got.is_contiguous(), name


def test_a_padding_tokens_row_stays_without_gradient() -> None:
    layer, ids, slope = nn.Embedding(9, 4, padding_idx=2), torch.tensor([[1, 2, 7], [7, 7, 2]]), torch.randn(2, 3, 4)
    layer(ids).backward(slope)
    wanted, layer.weight.grad = layer.weight.grad, None
    with own_products(layer, Halves()):
        out = layer(ids)
    for times in (1, 2):
        with added_in_place():
            out.backward(slope, retain_graph=True)
        assert wanted is not None and torch.allclose(layer.weight.grad, times * wanted)
        assert layer.weight.grad is not None and not layer.weight.grad[2].any()


def test_frozen_weights_are_cast_once_until_they_change() -> None:
    halves, weight = Halves(), torch.randn(8, 8)
    first = halves(weight, torch.bfloat16)
    assert halves(weight, torch.bfloat16) is first and first.dtype == torch.bfloat16
    weight.mul_(2)
    assert torch.equal(halves(weight, torch.bfloat16), weight.bfloat16())
    assert halves(weight, torch.float16).dtype == torch.float16
    layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        with own_products(layer, halves):
            got = layer(x)
    assert torch.equal(got, wanted) and got.dtype == wanted.dtype


def test_an_activation_that_is_written_out_is_torchs_own() -> None:
    """GPT-2's and T5's: values and gradients of the formula in float64, and one operation instead of eight."""
    written = NewGELUActivation()
    holder = nn.Sequential(nn.Linear(2, 2), written)
    x = torch.linspace(-6, 6, 1001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    wanted = written(exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    with own_products(holder, Halves()), profile(activities=[ProfilerActivity.CPU]) as seen:
        got = written(x)
    (mine,) = torch.autograd.grad(got.sum(), x)
    assert torch.allclose(got.double(), wanted, atol=1e-6) and torch.allclose(mine.double(), slope, atol=1e-5)
    assert {e.key for e in seen.key_averages()} == {"aten::gelu"}
    assert "forward" not in vars(written)
