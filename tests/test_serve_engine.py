"""The engine of the server: whatever is asked at once, each answer is what the sampler gives alone; nothing that fails, leaves
or comes in the middle touches the others."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving import Here, here
from temper import hub
from temper.errors import TemperError
from temper.models import adapters, load
from temper.rollouts.decoding import Completion, Decoding
from temper.rollouts.distribution import uniforms, warped
from temper.rollouts.memory import Memory
from temper.rollouts.native import SMALL
from temper.rollouts.sampler import Sampler
from temper.serve.answering import ended
from temper.serve.engine import Work
from temper.serve.protocol import ChatRequest, CompletionRequest
from temper.serve.refusals import Refused

PROMPTS = ("Hello", "У Києві відкрили парк.", "x" * 70, "12 345,67 €\n\n", "a b c " * 20)


@pytest.fixture(scope="module")
def at(served_models: Path) -> Iterator[Here]:
    """Two LoRAs and a base in one lane, of six slots, so that rows wait, leave and enter."""
    with here(served_models, ["base"], ("witty", "dry"), slots=6) as made:
        yield made


@functools.cache
def plain(folder: Path, name: str, model: str = "base") -> tuple[Any, Any]:
    """The model and its adapter as transformers and PEFT load them, and the tokenizer."""
    own = () if name == model else (str(folder / "adapters" / name / "adapter"),)
    source = hub.Source(str(folder / model), None, own)
    hf = adapters.open_model(source)[0]
    return hf.eval(), load.tokenizer(source)


@functools.cache
def sampler(folder: Path, name: str, model: str, ends: frozenset[int]) -> Sampler:
    hf, tokenizer = plain(folder, name, model)
    return Sampler(hf, tokenizer, end_ids=ends)


def alone(folder: Path, name: str, work: Work, decoding: Decoding, n: int, seed: int, model: str = "base") -> list[Completion]:
    return sampler(folder, name, model, work.drafts[0].ends).sample([work.ids], decoding, completions=n, seed=seed)[0]


async def asked(at: Here, chat: bool = False, **body: Any) -> tuple[Work, Any]:
    """A request of one prompt, to its end."""
    request: Any = (ChatRequest if chat else CompletionRequest).model_validate(body)
    served = at.desk.served(request.model)
    (work,) = at.desk.works(served, request)
    with at.desk.under(served, [work]):
        await ended(work)
    return work, request


def tied(hf: Any, ids: tuple[int, ...], decoding: Decoding, noise: float, token: int) -> bool:
    """Whether rounding alone decides on this token: two are likeliest, the noise lies at a seam of its part, or the last of the
    tokens that top_k, top_p or min_p keep does."""
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([ids])).logits[:, -1].float()
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, list(ids)] = True
    if decoding.temperature == 0:
        two = warped(logits, decoding, seen)[0].topk(2).values
        return float(two[0] - two[1]) < 1e-4
    every = warped(logits, decoding.model_copy(update={"top_k": None, "top_p": 1.0, "min_p": 0.0}), seen)[0].double()
    best = every.sort(descending=True).values
    if decoding.top_k is not None and decoding.top_k < len(best) and float(best[decoding.top_k - 1] - best[decoding.top_k]) < 1e-4:
        return True
    if decoding.min_p and float(((every - best[0]).exp() - decoding.min_p).abs().min()) < 1e-5:
        return True
    whole = warped(logits, decoding.model_copy(update={"top_p": 1.0, "min_p": 0.0}), seen)[0].double().softmax(-1)
    sums = warped(logits, decoding, seen)[0].double().softmax(-1).cumsum(-1)
    edges = [abs(float(sums[t]) - noise) for t in (token, token - 1) if t >= 0]
    mass = whole.sort(descending=True).values.cumsum(-1)
    return min(edges) < 1e-5 or (decoding.top_p < 1 and float((mass - decoding.top_p).abs().min()) < 1e-5)


def check(folder: Path, name: str, work: Work, request: Any, model: str = "base") -> None:
    """The answers are the sampler's, but for ties within rounding."""
    decoding, n, seed = work.drafts[0].decoding, len(work.drafts), request.seed
    for k, (draft, expected) in enumerate(zip(work.drafts, alone(folder, name, work, decoding, n, seed, model), strict=True)):
        done = draft.done
        assert done is not None
        if done.ids != expected.ids:
            at = next(i for i, (a, b) in enumerate(itertools.zip_longest(done.ids, expected.ids)) if a != b)
            noise = float(uniforms(at + 1, seed, 0, 0, k)[at])
            token = (draft.ids if done.ids[at:] else [*done.ids, done.end])[at]
            assert tied(plain(folder, name, model)[0], (*work.ids, *expected.ids[:at]), decoding, noise, token or 0), (name, request)
            continue
        assert (done.ended, done.end, done.text) == (expected.ended, expected.end, expected.text)
        np.testing.assert_allclose(done.raw, expected.raw, atol=1e-5, rtol=5e-6)
        np.testing.assert_allclose(done.logps, expected.logps, atol=1e-5 / min(1, decoding.temperature or 1), rtol=5e-6)


def mixed(names: tuple[str, ...], count: int, longest: int = 60) -> list[dict[str, Any]]:
    """Requests of every kind."""
    draw = random.Random(3)
    found = []
    for k in range(count):
        body: dict[str, Any] = {
            "model": names[k % len(names)], "prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(1, longest),
            "seed": draw.choice([0, k, -k, 2**63 + k]), "n": draw.choice([1, 1, 2, 5]),
            "temperature": draw.choice([0, 0.3, 1, 1, 1.7]),
        }  # fmt: skip
        for field, values in {
            "top_p": [0.1, 0.9], "top_k": [1, 7, 1000], "min_p": [0.05], "repetition_penalty": [1.3, 0.8],
            "stop": ["e", ["zz", "\u0430"]], "min_tokens": [1],
        }.items():  # fmt: skip
            if draw.random() < 0.3:
                body[field] = draw.choice(values)
        found.append(body)
    return found


def test_many_requests_at_once_are_each_what_the_sampler_gives(at: Here, served_models: Path) -> None:
    bodies = mixed(("base", "witty", "dry"), 48)

    async def all_at_once() -> list[Any]:
        async def one(k: int, body: dict[str, Any]) -> Any:
            await asyncio.sleep(0.004 * (k % 12))  # some come while others are being written
            return await asked(at, **body)

        return await asyncio.gather(*(one(k, body) for k, body in enumerate(bodies)))

    for body, (work, request) in zip(bodies, at.run(all_at_once), strict=True):
        check(served_models, body["model"], work, request)
    assert at.desk.under_way == 0
    differ = {tuple(at.run(lambda m=m: asked(at, model=m, prompt="Hello", seed=1, max_tokens=30))[0].drafts[0].ids) for m in ("base", "witty", "dry")}  # fmt: skip
    assert len(differ) == 3


def test_a_conversation_is_that_of_the_chat_template(at: Here, served_models: Path) -> None:
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    work, request = at.run(lambda: asked(at, chat=True, model="witty", messages=said, seed=4, max_completion_tokens=30))
    tokenizer = load.tokenizer(hub.Source(str(served_models / "base")))
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    written = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert list(work.ids) == tokenizer(written, add_special_tokens=False)["input_ids"]
    check(served_models, "witty", work, request)


def test_log_probabilities_are_those_of_a_plain_forward_pass(at: Here, served_models: Path) -> None:
    for name in ("base", "witty"):
        hf, _ = plain(served_models, name)
        for temperature in (0, 1.5):
            work, _ = at.run(lambda t=temperature, m=name: asked(at, model=m, prompt="Hello there", seed=3, n=2, max_tokens=25, logprobs=4, temperature=t))  # fmt: skip
            for draft in work.drafts:
                done = draft.done
                assert done is not None
                ids = [*work.ids, *draft.ids, *([] if done.end is None else [done.end])]
                with torch.no_grad():
                    logps = hf(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
                for place, (raw, tops) in enumerate(zip(draft.raw, draft.tops, strict=True)):
                    row = logps[len(work.ids) + place - 1]
                    assert abs(raw - float(row[ids[len(work.ids) + place]])) < 1e-5
                    best = row.topk(4)
                    np.testing.assert_allclose([p for _, p in tops], best.values, atol=1e-5)
                    assert all(abs(p - float(row[i])) < 1e-5 for i, p in tops)


def test_adapters_come_and_go_while_others_are_written(at: Here, served_models: Path) -> None:
    bodies = mixed(("base", "witty", "dry"), 12, longest=200)

    async def both() -> Any:
        running = [asyncio.ensure_future(asked(at, **body)) for body in bodies]
        late = []
        for turn in range(4):
            await asyncio.to_thread(at.gallery.load, "late", "late")
            mine = asyncio.ensure_future(asked(at, model="late", prompt="Hello", seed=turn, max_tokens=40))
            await asyncio.sleep(0.02)
            await asyncio.to_thread(at.gallery.unload, "late")  # its answer is finished all the same
            late.append(await mine)
        return await asyncio.gather(*running), late

    done, late = at.run(both)
    for body, (work, request) in zip(bodies, done, strict=True):
        check(served_models, body["model"], work, request)
    for work, request in late:
        check(served_models, "late", work, request)
    lane = at.gallery["base"].lane
    assert at.on_engine(lambda: set(lane.rowwise.factors)) == {"witty#1", "dry#2"} and not lane.leaving


def test_an_adapter_that_left_before_its_request_was_taken_in(at: Here) -> None:
    """Between the reading of a request and its first token another may take the adapter away."""
    at.gallery.load("late", "late")
    served = at.gallery["late"]
    request = CompletionRequest(model="late", prompt="Hello", max_tokens=5)

    async def crossing() -> Any:
        works = at.desk.works(served, request)
        others = asyncio.ensure_future(asked(at, model="witty", prompt="Hello", seed=1, max_tokens=50))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(at.gallery.unload, "late")
        with at.desk.under(served, works), pytest.raises(Refused, match="unloaded meanwhile"):
            await ended(works[0])
        echo = CompletionRequest(model="late", prompt="Hello", max_tokens=0, echo=True, logprobs=1)
        with pytest.raises(Refused, match="unloaded meanwhile"):
            await at.desk.whole(served, echo, at.desk.works(served, echo))
        return (await others)[0]

    assert at.run(crossing).drafts[0].done is not None


def test_two_who_load_one_name_at_once(at: Here) -> None:
    async def race() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(at.gallery.load, "late", "late") for _ in range(6)), return_exceptions=True)

    async def leave() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(at.gallery.unload, "late") for _ in range(6)), return_exceptions=True)

    for do in (race, leave):
        found = at.run(do)
        assert sum(not isinstance(x, Exception) for x in found) == 1
        assert all("late" in str(x) for x in found if isinstance(x, Exception))
    lane = at.gallery["base"].lane
    assert len(at.on_engine(lambda: set(lane.rowwise.factors))) == 2


def test_a_damaged_adapter_leaves_the_base_as_it_was(at: Here, served_models: Path, tmp_path: Path) -> None:
    """Found out while it is being put on: its weights have other shapes than its configuration says."""
    for name, change in {"wrong": {"r": 5}, "spoilt": {"peft_type": "NONE_SUCH"}, "empty": None}.items():
        folder = served_models / "adapters" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(served_models / "adapters/late", folder)
        try:
            config = folder / "adapter" / "adapter_config.json"
            config.write_text("{" if change is None else json.dumps({**json.loads(config.read_text()), **change}))
            with pytest.raises(TemperError):
                at.gallery.load(name, name)
        finally:
            shutil.rmtree(folder)
        work, request = at.run(lambda: asked(at, model="dry", prompt="Hello", seed=5, max_tokens=20))
        check(served_models, "dry", work, request)
    model = at.gallery["base"].lane.model
    assert not [n for n, _ in model.named_parameters() if "lora" in n]


def test_weights_are_read_anew(served_models: Path) -> None:
    """The base then answers as the other one does; what cannot be taken changes nothing."""
    with here(served_models, ["base"], reloads=True) as at:
        at.gallery.folders.append(served_models.resolve())
        how: dict[str, Any] = {"model": "base", "prompt": "Hello", "n": 3, "max_tokens": 20, "seed": 6}

        def written(model: str) -> bool:
            work, request = at.run(lambda: asked(at, **how))
            expected = alone(served_models, model, work, request.decoding(20), 3, 6, model)
            return [d.done.ids for d in work.drafts] == [c.ids for c in expected]

        assert written("base") and not written("other")
        at.gallery.reload(str(served_models / "other"))
        assert written("other") and not written("base")
        for path, said in (("gpt2", "of other shapes"), ("nowhere", "there is no model"), ("adapters", "cannot")):
            with pytest.raises(TemperError, match=said):
                at.gallery.reload(str(served_models / path))
        assert written("other")
        at.gallery.reload(str(served_models / "base"))
        assert written("base")
        at.gallery.load("late", "late")
        with pytest.raises(TemperError, match="more than one model is served"):
            at.gallery.reload(str(served_models / "other"))
        at.gallery.unload("late")
        assert written("base")


def test_giving_up_frees_the_slot_and_changes_nothing_for_others(at: Here, served_models: Path) -> None:
    lane = at.gallery["base"].lane

    async def some_leave() -> Any:
        stay = [{"model": m, "prompt": "Hello", "seed": k, "max_tokens": 60, "n": 2} for k, m in enumerate(("base", "witty"))]
        kept = [asyncio.ensure_future(asked(at, **body)) for body in stay]
        long = {"model": "dry", "prompt": "x", "max_tokens": 390, "min_tokens": 390, "n": 6, "seed": 1}
        gone = [asyncio.ensure_future(asked(at, **long)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert 18 <= at.desk.under_way <= 22
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert at.desk.under_way <= 4
        return stay, await asyncio.gather(*kept)

    stay, done = at.run(some_leave)
    for body, (work, request) in zip(stay, done, strict=True):
        check(served_models, body["model"], work, request)
    assert at.on_engine(lambda: (lane.works, lane.decoder.rows, lane.decoder.waiting, lane.decoder.living.count(None))) == ([], [], type(lane.decoder.waiting)(), 12)  # fmt: skip


def test_memory_grows_as_need_be_and_is_given_back(at: Here, served_models: Path) -> None:
    """Answers longer than what is taken at first, and then prompts that are longer than all before them."""
    lane = at.gallery["base"].lane

    async def growing() -> Any:
        body = {"model": "witty", "prompt": "Hi", "seed": 2, "max_tokens": 300, "min_tokens": 280, "n": 3}
        first = asyncio.ensure_future(asked(at, **body))
        await asyncio.sleep(0.2)
        later = await asyncio.gather(*(asked(at, model="base", prompt="z" * width, seed=width, max_tokens=20) for width in (90, 170, 350)))
        return [await first, *later], at.engine.call(lambda: lane.decoder.memory.sizes).result()

    done, _ = at.run(growing)
    for work, request in done:
        check(served_models, request.model, work, request)
    memory: Memory = at.on_engine(lambda: lane.decoder.memory)
    assert memory.sizes == SMALL and not memory.stored


def test_a_step_that_fails_fails_those_it_was_for_and_no_more(at: Here, served_models: Path) -> None:
    lane = at.gallery["base"].lane
    weight = lane.model.get_output_embeddings().weight
    before = weight.detach().clone()

    async def broken() -> Any:
        body = {"model": "witty", "prompt": "Hello", "seed": 1, "max_tokens": 300, "min_tokens": 300}
        running = [asyncio.ensure_future(asked(at, **{**body, "seed": k})) for k in range(8)]
        await asyncio.sleep(0.05)
        await asyncio.wrap_future(at.engine.call(lambda: weight.fill_(torch.nan)))
        return await asyncio.gather(*running, return_exceptions=True)

    failed = at.run(broken)
    assert all(isinstance(f, Refused) and f.status == 500 and "not numbers" in f.message for f in failed), failed
    at.on_engine(lambda: weight.copy_(before))
    work, request = at.run(lambda: asked(at, model="witty", prompt="Hello", seed=1, max_tokens=30))
    check(served_models, "witty", work, request)
    assert at.desk.under_way == 0 and at.engine.thread.is_alive()


@pytest.mark.parametrize("name", ["base", "witty"])
def test_a_prompt_is_scored_as_transformers_scores_it(name: str, at: Here, served_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("temper.serve.engine.SCORED", 7)
    hf, tokenizer = plain(served_models, name)
    ids = tokenizer("Hello there, how are you?")["input_ids"]
    request = CompletionRequest(model=name, prompt=[ids, ids[:9]], max_tokens=0, echo=True, logprobs=3)
    found = at.run(lambda: at.desk.whole(at.desk.served(name), request, at.desk.works(at.desk.served(name), request)))
    for choice, own in zip(found["choices"], (ids, ids[:9]), strict=True):
        with torch.no_grad():
            logps = hf(input_ids=torch.tensor([own])).logits[0].float().log_softmax(-1)
        scores = choice["logprobs"]
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        expected = logps[torch.arange(len(own) - 1), torch.tensor(own[1:])]
        np.testing.assert_allclose(scores["token_logprobs"][1:], expected, atol=1e-5)
        for row, tops in zip(logps, scores["top_logprobs"][1:], strict=False):
            np.testing.assert_allclose(max(tops.values()), float(row.max()), atol=1e-5)
        assert "".join(scores["tokens"]) == choice["text"] == tokenizer.decode(own)
        assert all(choice["text"][o:].startswith(t) for o, t in zip(scores["text_offset"], scores["tokens"], strict=True))
