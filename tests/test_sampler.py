"""The sampler against the plain model: what is sampled, with which probability, whatever is decoded beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from temper.errors import DataError
from temper.models.scores import Policy
from temper.rollouts import memory, native, proof
from temper.rollouts.decoding import Completion, Decoding
from temper.rollouts.sampler import Sampler
from temper.trees import group, join, rounded
from tiny_models import PADDED, TREES, VOCABULARY, WINDOW, build, sharpen, warmed

NATS = 1e-4
FAMILIES = [f for f in TREES if f != "falcon rope"]  # which has an attention of its own
ENDS = [2, 5, 6, 20, 35, 50, 65, 80]
SAMPLED = Decoding(max_new_tokens=12, temperature=1.0)


def gpt_oss() -> PreTrainedModel:
    """Attention sinks, and a window in every second layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    sharpen(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(1.0, 1.0)
    return model.eval()


def made(family: str) -> PreTrainedModel:
    return gpt_oss() if family == "gpt_oss" else build(family)


def tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Token k is written words[k], with nothing between."""
    words = words or [f"<{k}>" for k in range(VOCABULARY)]
    plain = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, words[0]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=words[0])


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(7, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def tokens(completion: Completion) -> list[int]:
    return completion.ids + ([] if completion.end is None else [completion.end])


def ids(answers: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[tokens(c) for c in some] for some in answers]


def close(a: Sequence[Sequence[Completion]], b: Sequence[Sequence[Completion]], nats: float = NATS) -> None:
    assert ids(a) == ids(b)
    for x, y in zip([c for some in a for c in some], [c for some in b for c in some], strict=True):
        assert np.allclose(x.raw, y.raw, rtol=0, atol=nats) and np.allclose(x.logps, y.logps, rtol=0, atol=nats)
        assert (x.ended, x.end, x.text) == (y.ended, y.end, y.text)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_log_probabilities_are_those_of_the_model(family: str) -> None:
    """Recomputed by the pass that trains, on the same tokens; some rows end early, others take their places."""
    model = made(family)
    sampler = Sampler(model, tokenizer(), end_ids=ENDS, slots=5)
    assert sampler.layout == "native", sampler.reason
    asked = prompts(3, 17, 9, 17, 33)
    answers = sampler.sample(asked, SAMPLED, completions=3)
    lengths = {len(tokens(c)) for some in answers for c in some}
    assert min(lengths) < max(lengths) == 12
    row = join([group(p, [tokens(c) for c in some]) for p, some in zip(asked, answers, strict=True)])
    with torch.no_grad():
        expected = Policy(model, "padded")(row).numpy()
    raw = np.concatenate([c.raw for some in answers for c in some])
    assert raw.dtype == np.float32 and np.abs(raw - expected).max() < NATS
    assert np.array_equal(raw, np.concatenate([c.logps for some in answers for c in some]))
    assert expected.std() > 0.5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mistral", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_is_what_generate_gives(family: str, penalty: float) -> None:
    model = made(family)
    sampler = Sampler(model, tokenizer(), end_ids=ENDS, slots=3)
    assert sampler.layout == "native"
    asked = prompts(4, 21, 13, 8)
    answers = sampler.sample(asked, Decoding(max_new_tokens=20, repetition_penalty=penalty))
    for prompt, (answer,) in zip(asked, answers, strict=True):
        alone = torch.tensor([prompt])
        theirs = model.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=20, do_sample=False, eos_token_id=ENDS,
            pad_token_id=0, repetition_penalty=penalty,
        )  # fmt: skip
        assert tokens(answer) == theirs[0, len(prompt) :].tolist()
        assert not answer.logps.any() and answer.raw.min() < -0.1  # greedy is certain; the model is not


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_sample_does_not_change_with_its_batch(family: str) -> None:
    sampler = Sampler(made(family), tokenizer(), end_ids=ENDS)
    asked = prompts(3, 17, 9, 17, 33)
    decoding = Decoding(max_new_tokens=12, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    whole = sampler.sample(asked, decoding, completions=4, seed=3, step=5)
    assert len({tuple(t) for some in ids(whole) for t in some}) > 15
    for slots in (1, 3, 6):  # rows retire and others are admitted
        sampler.slots = slots
        close(sampler.sample(asked, decoding, completions=4, seed=3, step=5), whole)
    order = [4, 2, 0, 3, 1]
    turned = sampler.sample([asked[i] for i in order], decoding, completions=4, seed=3, step=5, numbers=order)
    close(turned, [whole[i] for i in order])
    alone = sampler.sample(asked[3:4], decoding, completions=2, seed=3, step=5, numbers=[3])
    close(alone, [whole[3][:2]])
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}, {"seed": 3, "step": 5, "numbers": [9, 1, 2, 3, 4]}):
        assert ids(sampler.sample(asked, decoding, completions=4, **other))[0] != ids(whole)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss", "opt"])
def test_generate_gives_the_same_samples(family: str) -> None:
    sampler = Sampler(made(family), tokenizer(), end_ids=ENDS, slots=4)
    decoding = Decoding(max_new_tokens=10, temperature=1.1, top_k=40, min_p=0.02, repetition_penalty=1.1, stop=["<9"])
    asked = prompts(5, 12, 12, 30)
    assert sampler.layout == "native", "two engines are compared, not one with itself"
    expected = sampler.sample(asked, decoding, completions=3, seed=1)
    sampler.layout = "generate"
    close(sampler.sample(asked, decoding, completions=3, seed=1), expected)


@pytest.mark.filterwarnings("ignore:.*falling back")
@pytest.mark.parametrize("family", [*PADDED, "falcon rope"])
def test_other_models_are_decoded_by_generate_and_say_so(family: str) -> None:
    model = build(family)
    settings, attention = model.generation_config, model.config._attn_implementation
    sampler = Sampler(model, tokenizer(), end_ids=ENDS)
    assert sampler.layout == "generate" and sampler.reason.startswith("by generate: ") and len(sampler.reason) > 20
    asked = prompts(6, 11)
    answers = sampler.sample(asked, SAMPLED, completions=2)
    close(sampler.sample(asked[1:], SAMPLED, completions=2, numbers=[1]), answers[1:])
    row = join([group(p, [tokens(c) for c in some]) for p, some in zip(asked, answers, strict=True)])
    with torch.no_grad():
        expected = Policy(model, "padded")(row).numpy()
    assert np.abs(np.concatenate([c.raw for some in answers for c in some]) - expected).max() < NATS
    assert model.generation_config is settings and model.config._attn_implementation == attention


@pytest.mark.parametrize(("kind", "together"), [("rwkv", "none"), ("recurrent_gemma", "equal length")])
def test_models_that_a_batch_confuses(kind: str, together: str) -> None:
    """RecurrentGemma reads padding as tokens; RWKV as transformers has it loses its state in any batch."""
    torch.manual_seed(0)
    own = {"rwkv": {"attention_hidden_size": 32}, "recurrent_gemma": {"lru_width": 32, "num_attention_heads": 4}}[kind]
    layers = {"rwkv": 2, "recurrent_gemma": 3}[kind]
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        pad_token_id=0,
        **own,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    sharpen(model)
    sampler = Sampler(model, tokenizer(), end_ids=[])
    assert (sampler.layout, sampler.trust[0]) == ("generate", together)
    asked = prompts(6, 11, 11, 6)
    answers = sampler.sample(asked, SAMPLED)
    for k, prompt in enumerate(asked):
        close(sampler.sample([prompt], SAMPLED, numbers=[k]), answers[k : k + 1])
        ids = torch.tensor([prompt + answers[k][0].ids])
        with torch.no_grad():
            logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()
        assert np.abs(answers[k][0].raw - expected).max() < NATS


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_is_as_it_was(family: str) -> None:
    model = build(family).train()
    names = [set(vars(m)) for m in model.modules()]
    sampler = Sampler(model, tokenizer(), end_ids=ENDS)
    next(model.children()).eval()  # a part that is frozen, say
    modes = [m.training for m in model.modules()]
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    sampler.sample(prompts(4, 8), SAMPLED)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native.Decoder, "_retire", broken)
        sampler.sample(prompts(4, 8), SAMPLED)
    assert [m.training for m in model.modules()] == modes and model.training
    assert model.config._attn_implementation == "sdpa" and [set(vars(m)) for m in model.modules()] == names
    assert torch.backends.mkldnn.matmul.fp32_precision == precision  # type: ignore[attr-defined]
    with pytest.raises(LookupError):
        memory._current.get()


def test_no_dropout() -> None:
    settings = {k: 0.5 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **settings
    )
    model = AutoModelForCausalLM.from_config(config)
    calm = Sampler(model.eval(), tokenizer(), end_ids=[]).sample(prompts(9), SAMPLED)
    model.train()
    close(Sampler(model, tokenizer(), end_ids=[]).sample(prompts(9), SAMPLED), calm)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_adapter_in_training_is_sampled_as_it_is_now(family: str) -> None:
    torch.manual_seed(3)
    wrapped = get_peft_model(build(family), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    sampler = Sampler(wrapped, tokenizer(), end_ids=[])
    assert sampler.layout == "native"
    seen = []
    for _ in range(2):
        answers = sampler.sample(prompts(9, 14), SAMPLED, completions=2)
        row = join([group(p, [c.ids for c in some]) for p, some in zip(prompts(9, 14), answers, strict=True)])
        with torch.no_grad():
            expected = Policy(wrapped, "tree")(row).numpy()
        assert np.abs(np.concatenate([c.raw for some in answers for c in some]) - expected).max() < NATS
        seen.append(ids(answers))
        warmed(wrapped, 0.2)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_half_precision(family: str) -> None:
    model = build(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampler = Sampler(model, tokenizer(), end_ids=[])
        assert sampler.layout == "native", sampler.reason
        answers = sampler.sample(prompts(9, 20), SAMPLED, completions=2)
        row = join([group(p, [c.ids for c in some]) for p, some in zip(prompts(9, 20), answers, strict=True)])
        with torch.no_grad():
            expected = Policy(model, "padded")(row).float().numpy()
    difference = np.abs(np.concatenate([c.raw for some in answers for c in some]) - expected)
    assert np.median(difference) < 0.05
    halved = Sampler(build(family).to(torch.bfloat16), tokenizer(), end_ids=[])
    assert halved.layout == "native", halved.reason
    assert all(c.logps.dtype == np.float32 for some in halved.sample(prompts(9), SAMPLED) for c in some)


def test_a_prompt_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[memory.Memory] = []
    start = memory.Memory.__init__

    def noted(self: memory.Memory, *sizes: int) -> None:
        kept.append(self)
        start(self, *sizes)

    sampler = Sampler(build("llama"), tokenizer(), end_ids=ENDS)
    monkeypatch.setattr(memory.Memory, "__init__", noted)
    asked = prompts(40, 33)
    sampler.sample(asked, SAMPLED, completions=8)
    sampler.sample([asked[0]] * 4, SAMPLED)
    (first, second) = ([x.prompt[0].shape for x in m.stored.values()] for m in kept)
    assert first == [(2, 2, 64, 8)] * 2  # prompts, key heads, tokens in steps of 32, head size; two layers
    assert second == [(1, 2, 64, 8)] * 2
    assert [x.own[1].shape for x in kept[0].stored.values()] == [(16, 2, 32, 8)] * 2


def test_a_window_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    view = memory.Memory.view
    monkeypatch.setattr(memory.Memory, "view", lambda self, window, device: view(self, None, device))
    assert proof.prove(Policy(build("llama")))[0] == "native"
    layout, why = proof.prove(Policy(build("gemma3")))
    assert layout == "generate" and "differs" in why
    layout, why = proof.prove(Policy(build("mistral")))
    assert layout == "generate" and "differs" in why


def test_positions_off_by_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = memory.Memory.begin
    monkeypatch.setattr(
        memory.Memory,
        "begin",
        lambda self, owners, at, device: begin(self, owners, [max(0, a - 1) for a in at], device),
    )
    assert proof.prove(Policy(build("llama")))[0] == "generate"


def test_a_layer_that_keeps_its_attention_is_found() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    layout, why = proof.prove(Policy(model))
    assert layout == "generate" and "2 layers keep keys and values, and 1 of them" in why


def test_ends_and_limits() -> None:
    sampler = Sampler(build("llama"), tokenizer(), end_ids=ENDS)
    answers = [
        c
        for some in sampler.sample(prompts(5, 9, 14), Decoding(max_new_tokens=10, temperature=1.5), completions=8)
        for c in some
    ]
    ended, cut = [c for c in answers if c.ended], [c for c in answers if not c.ended]
    assert ended and cut
    for c in ended:
        assert c.end in ENDS and not set(c.ids) & set(ENDS) and len(c.logps) == len(c.raw) == len(c.ids) + 1
    for c in cut:
        assert c.end is None and len(c.ids) == len(c.logps) == len(c.raw) == 10
    assert [c.text for c in answers] == [None] * len(answers)


def test_stop_strings() -> None:
    """What stands before the string is kept to the character; tokens that hold a part of it are not."""
    words = [f"a{k} " if k % 3 else f"b{k};c" for k in range(VOCABULARY)]
    sampler = Sampler(build("llama"), tokenizer(words), end_ids=[])
    free = [c for (c,) in sampler.sample(prompts(5, 9, 14, 20), SAMPLED)]
    stopped = [c for (c,) in sampler.sample(prompts(5, 9, 14, 20), SAMPLED.model_copy(update={"stop": [";", "ca"]}))]
    assert any(c.ended for c in stopped)
    for before, after in zip(free, stopped, strict=True):
        whole = "".join(words[i] for i in before.ids)
        if ";" not in whole:
            assert after.ids == before.ids and not after.ended and after.text is None
            continue
        n = len(after.ids)
        assert after.ended and after.end is None and after.text == whole[: whole.index(";")]
        assert after.ids == before.ids[:n] and after.text.startswith("".join(words[i] for i in after.ids))
        assert ";" in words[before.ids[n]]
        assert np.allclose(after.raw, before.raw[:n], atol=NATS) and np.allclose(
            after.logps, before.logps[:n], atol=NATS
        )


def test_what_cannot_be_asked() -> None:
    sampler = Sampler(build("llama"), tokenizer(), end_ids=[])
    with pytest.raises(DataError, match="no tokens"):
        sampler.sample([[5], []], SAMPLED)
    with pytest.raises(ValueError, match="empty stop string"):
        Decoding(stop=["a", ""])
    assert sampler.sample([], SAMPLED) == []


def test_progress_counts_completions() -> None:
    sampler = Sampler(build("llama"), tokenizer(), end_ids=ENDS, slots=3)
    for layout in ("native", "generate"):
        sampler.layout = layout  # type: ignore[assignment]
        done: list[int] = []
        sampler.sample(prompts(5, 9), SAMPLED, completions=4, progress=done.append)
        assert sum(done) == 8


def test_a_prefill_computes_the_last_layer_only_where_it_is_read() -> None:
    model, asked = build("llama"), prompts(9, 4, 30)
    seen: dict[str, list[int]] = {"first": [], "last": []}
    for name, layer in (("first", model.model.layers[0]), ("last", model.model.layers[-1])):
        layer.mlp.act_fn.register_forward_hook(lambda _, given, out, name=name: seen[name].append(out[..., 0].numel()))
    sampler = Sampler(model, tokenizer(), end_ids=[])
    for some in seen.values():
        some.clear()
    sampler.sample(asked, Decoding(max_new_tokens=2, temperature=1.0), seed=3)
    width = rounded(30, memory.ROUND)
    assert sampler.layout == "native" and seen == {"first": [3 * width, 3], "last": [3, 3]}
