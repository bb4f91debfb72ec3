"""Every adapter method on a decoder and on an encoder–decoder: what all of them promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from temper import hub, shapes, wording
from temper.errors import ModelError
from temper.models import adapted, adapters, load
from temper.models.adapters import Adapter
from temper.models.proof import prove
from temper.models.scores import Policy
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.stages import pretrain
from temper.trees import group, join
from test_chat import small
from tiny_models import VOCABULARY, build

TARGETS = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4}, "adalora": {"r": 2, "first_r": 4}, "ia3": {}, "prompt": {"tokens": 5}, "p_tuning": {"tokens": 5},
    "prefix": {"tokens": 5}, "lora+prompt": {"r": 4, "tokens": 5}, "adalora+prompt": {"r": 2, "first_r": 4, "tokens": 5},
    "ia3+p_tuning": {"tokens": 5}, "lora+prefix": {"r": 4, "tokens": 5},
}  # fmt: skip
FAMILIES = ["llama", "t5"]
EVERY = [(family, method) for family in FAMILIES for method in METHODS]


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [draw(9, 1), draw(4, 2)]
ANSWERS = [[draw(5, 3), draw(7, 4)], [draw(6, 5), draw(3, 6)]]
ROW = join([group(p, some) for p, some in zip(PROMPTS, ANSWERS, strict=True)])


def folder_of(family: str, folder: Path) -> hub.Source:
    build(family).save_pretrained(folder)
    return hub.Source(str(folder))


def adapter_of(family: str, method: str, **more: Any) -> Adapter:
    layers = method.split("+")[0] in ("lora", "adalora")
    return Adapter(method=method, **METHODS[method], **({"targets": TARGETS[family]} if layers else {}), **more)


def stirred(model: Any) -> Any:
    """Everything that is trained drawn anew, so that each part of it shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (0.3 if "lora" in name or "ia3" in name else 0.5))
    return model


def fresh(family: str, method: str, folder: Path, **more: Any) -> tuple[Any, hub.Source]:
    base = folder_of(family, folder / "base")
    return adapters.attach(load.model(base)[0], adapter_of(family, method, **more), seed=0), base


def theirs(hf: Any) -> torch.Tensor:
    """What PEFT's own forward pass gives each answer alone, one after another; nothing of ours."""
    out = []
    for prompt, some in zip(PROMPTS, ANSWERS, strict=True):
        for answer in some:
            wanted = torch.tensor(answer)
            if adapted.inner(hf).config.is_encoder_decoder:
                logits = hf(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]]), use_cache=False).logits[0]  # fmt: skip
            else:
                ids = torch.tensor([[*prompt, *answer]])
                logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
            out.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
    return torch.cat(out)


def trained(hf: Any) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in hf.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "method"), EVERY)
def test_scores_and_gradients_are_pefts_own(family: str, method: str, tmp_path: Path) -> None:
    hf = stirred(fresh(family, method, tmp_path)[0]).eval()
    alone, weights = theirs(hf), torch.linspace(0.5, 1.5, len(ROW.tgt))
    mine = trained(hf)
    wanted = torch.autograd.grad((alone * weights).sum(), list(mine.values()), allow_unused=True)
    policy = Policy(hf).eval()
    proof = prove(policy)
    if method.endswith("prefix") and family == "t5":  # distances to the prefix grow along a line
        assert proof["layout"] == "padded"
    for layout in {proof["layout"], "padded"}:
        policy.layout = layout
        got = policy(ROW)
        assert torch.allclose(got, alone, atol=2e-4), (layout, (got - alone).abs().max())
        grads = torch.autograd.grad((got * weights).sum(), list(mine.values()), allow_unused=True)
        for name, a, b in zip(mine, grads, wanted, strict=True):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert (a - b).norm() <= 2e-4 * b.norm() + 1e-5, (layout, name)
            assert b.norm() > 0 or "lora_A" in name, f"{name} is not trained"


@pytest.mark.parametrize(("family", "method"), EVERY)
def test_it_starts_as_nothing_trains_itself_alone_and_switches_off(family: str, method: str, tmp_path: Path) -> None:
    base = folder_of(family, tmp_path / "base")
    plain, _ = load.model(base)
    before = theirs(plain.eval()).detach()
    frozen = {id(p): p.detach().clone() for p in plain.parameters()}
    hf: Any = adapters.attach(plain, adapter_of(family, method), seed=0)
    names = method.split("+")
    if not set(names) & {"prompt", "p_tuning", "prefix"}:
        assert torch.allclose(theirs(hf.eval()), before, atol=1e-5)
    marks = {"lora": "lora_", "adalora": "lora_", "ia3": "ia3_", "prompt": "prompt_encoder", "p_tuning": "prompt_encoder", "prefix": "prompt_encoder"}  # fmt: skip
    for name in names:
        assert any(marks[name] in n for n in trained(hf)), f"{name} is not trained"
    assert all(any(marks[name] in n for name in names) for n in trained(hf))
    policy = Policy(stirred(hf)).eval()
    assert (theirs(hf) - before).abs().max() > 0.05
    assert all(torch.equal(p, frozen[id(p)]) for p in hf.parameters() if id(p) in frozen)
    with adapted.off(hf):
        assert torch.allclose(policy(ROW), before, atol=1e-4)
    assert (policy(ROW) - before).abs().max() > 0.05


@pytest.mark.parametrize(("family", "method"), EVERY)
def test_on_disk_it_is_pefts(family: str, method: str, tmp_path: Path) -> None:
    hf, base = fresh(family, method, tmp_path)
    stirred(hf).eval()
    expected = theirs(hf).detach()
    adapters.save(hf, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    ours, _ = adapters.open_model(hub.Source(base.name, None, (str(tmp_path / "adapter"),)))
    assert torch.allclose(theirs(ours.eval()), expected, atol=1e-5)
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model: Any = kind.from_pretrained(base.name)
    folders = [tmp_path / "adapter"] if "+" not in method else sorted((tmp_path / "adapter").glob("*/"), key=lambda p: p.name[0] == "p")  # fmt: skip
    for folder in folders:  # what changes layers first, then the prompt around the model within
        model = PeftModel.from_pretrained(adapted.inner(model), str(folder))
    assert torch.allclose(theirs(model.eval()), expected, atol=1e-5)
    assert hub.locate(str(tmp_path / "adapter"), tmp_path).adapters == (str((tmp_path / "adapter").resolve()),)


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT")
@pytest.mark.parametrize(("family", "method"), EVERY)
def test_it_merges_exactly_or_says_that_it_cannot(family: str, method: str, tmp_path: Path) -> None:
    hf = stirred(fresh(family, method, tmp_path)[0]).eval()
    if adapter_of(family, method).virtual:
        with pytest.raises(ModelError, match="cannot be folded"):
            adapters.merged(hf)
        return
    expected = theirs(hf).detach()
    out, change = adapters.merged(hf)
    assert change > 0 and torch.allclose(theirs(out.eval()), expected, atol=1e-4)


@pytest.mark.parametrize(("family", "method"), EVERY)
def test_samples_come_from_what_is_scored(family: str, method: str, tmp_path: Path) -> None:
    """Log-probabilities of sampled tokens are those that the policy gives them, prompts of unlike lengths together."""
    hf = stirred(fresh(family, method, tmp_path)[0]).eval()
    tokenizer = small()
    sampler = Sampler(hf, tokenizer, end_ids={2})
    found = sampler.sample(PROMPTS, Decoding(temperature=1, max_new_tokens=6), completions=3, seed=1)
    policy = Policy(hf, "padded").eval()
    for prompt, group_ in zip(PROMPTS, found, strict=True):
        for one in group_:
            ids = [*one.ids, *([one.end] if one.end is not None else [])]
            scores = policy(join([group(prompt, [ids])]))
            assert np.allclose(one.raw, scores.detach().numpy(), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_begin_as_a_text(family: str, tmp_path: Path) -> None:
    text = "answer briefly"
    words = {"answer": 5, "briefly": 9, "?": 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "?")))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    base = folder_of(family, tmp_path / "base")
    model, _ = load.model(base)
    start = model.get_input_embeddings().weight[ids].detach()
    hf = adapters.attach(model, Adapter(method="prompt", tokens=len(ids) + 2, text=text), seed=0, tokenizer=tokenizer)
    soft = adapted.soft(hf)
    assert soft is not None and torch.equal(soft[:2], start) and torch.equal(soft[2:], start)


def test_one_of_two_adapters_alone_is_refused(tmp_path: Path) -> None:
    """PEFT would load it without complaint, and every answer would be wrong."""
    hf, base = fresh("t5", "lora+prompt", tmp_path)
    adapters.save(hf, tmp_path / "adapter", base, stage=None, identity=hub.identity(base))
    alone = dataclasses.replace(base, adapters=(str(tmp_path / "adapter" / "prompt_tuning"),))
    with pytest.raises(ModelError, match="trained together with another") as error:
        adapters.open_model(alone)
    assert str(tmp_path / "adapter") in error.value.do


def test_more_virtual_tokens_than_the_context(tmp_path: Path) -> None:
    model, _ = load.model(folder_of("llama", tmp_path / "base"))
    with pytest.raises(ModelError, match="leave no room in a context of 128"):
        adapters.attach(model, Adapter(method="prompt", tokens=128), seed=0)


def test_a_t5_has_no_end_of_positions_and_says_how_far_it_was_trained(tmp_path: Path) -> None:
    shape = pretrain.Shape(family="t5", vocabulary=300, hidden=32, layers=1, heads=2, context=40)
    model = pretrain.fresh(shape, shapes._Vocabulary(300), seed=0)
    model.save_pretrained(tmp_path / "base")
    again, _ = load.model(hub.Source(str(tmp_path / "base")))
    with pytest.raises(ModelError, match="leave no room in a context of 40"):
        adapters.attach(again, Adapter(method="prompt", tokens=40), seed=0)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lora", "lora, rank 4, alpha 8, on 8 layers (q, v)"),
        ("adalora", "adalora, ranks 6 to begin with and 4 on average at the end, alpha 8, on 8 layers (q, v)"),
        ("prompt", "prompt tuning, 5 virtual tokens"),
        ("lora+prompt", "lora, rank 4, alpha 8, on 8 layers (q, v) + prompt tuning, 5 virtual tokens"),
    ],
)
def test_an_adapter_in_words(method: str, said: str) -> None:
    layers = {} if method == "prompt" else {"r": 4, "targets": ["q", "v"]}
    tokens = {"tokens": 5} if "prompt" in method else {}
    model = build("t5")
    assert adapters.described(model) is None
    attached = adapters.attach(model, Adapter(method=method, **layers, **tokens), seed=0)
    assert adapters.described(attached) == said.replace("8 layers", f"{_many(model)} layers")


def _many(model: Any) -> int:
    return sum(name.rsplit(".", 1)[-1] in ("q", "v") for name, _ in model.named_modules())


def test_a_classifier_takes_no_virtual_tokens(tmp_path: Path) -> None:
    model, _ = load.model(folder_of("llama", tmp_path / "base"))
    with pytest.raises(ModelError, match="prompt adds tokens") as error:
        adapters.attach(model, Adapter(method="prompt"), seed=0, task="SEQ_CLS")
    assert "lora, adalora or ia3" in error.value.do


def test_targets_that_match_nothing_name_those_there_are(tmp_path: Path) -> None:
    model, _ = load.model(folder_of("t5", tmp_path / "base"))
    with pytest.raises(ModelError, match="«q_proj» matches no layer") as error:
        adapters.attach(model, Adapter(targets=["q_proj"]), seed=0)
    assert "EncDecAttention" not in error.value.do and " q" in error.value.do


def test_ia3_names_what_it_does_not_know(tmp_path: Path) -> None:
    model, _ = load.model(folder_of("cohere2", tmp_path / "base"))
    with pytest.raises(ModelError, match="of kind cohere2 is not known") as error:
        adapters.attach(model, Adapter(method="ia3"), seed=0)
    assert "feedforward" in error.value.do
    named = Adapter(method="ia3", targets=["k_proj", "down_proj"], feedforward=["down_proj"])
    assert len(trained(adapters.attach(model, named, seed=0))) == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "prompt", "r": 4}, "prompt takes tokens, text, and not r"),
        ({"method": "lora+prompt", "hidden": 4}, "and not hidden"),
        ({"method": "adalora", "r": 8, "first_r": 8}, "no rank to take away"),
        ({"method": "prompt+lora"}, "method"),
    ],
)
def test_what_a_method_does_not_take(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        Adapter(**settings)


def test_the_trainable_parameters_of_the_real_recipe() -> None:
    """ai-forever/ruT5-large from its published shape, without weights: rank 8 on queries and values of encoder and decoder,
    and 20 virtual tokens for the encoder alone."""
    config = T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        hf = adapters.attach(model, Adapter(method="lora+prompt", r=8, targets=["q", "v"], tokens=20), seed=0)
    every, mine = load.parameters(hf)
    assert (every, mine) == (740_047_872, 2_379_776)


def test_a_mistyped_method_is_told_all_there_are() -> None:
    """The names themselves, not the pattern that they are checked by."""
    found = wording._bound(next(m for m in Adapter.model_fields["method"].metadata if hasattr(m, "pattern")))
    names = found.split(" | ")
    assert {"lora", "prompt", "lora+prompt", "adalora+p_tuning"} <= set(names) and len(names) == 15
    for name in names:
        assert Adapter(method=name).method == name
