"""Models and adapters of other kinds behind the server's engine: those that `generate` decodes, and those that need a lane of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from serving import here
from temper.errors import ModelError
from test_serve_engine import alone, asked, check, mixed


@pytest.mark.parametrize(("model", "names"), [("t5", ("t5", "lines")), ("bloom", ("bloom",))])
def test_models_that_generate_decodes(model: str, names: tuple[str, ...], served_models: Path) -> None:
    with here(served_models, [model], names[1:], slots=4) as at:
        assert not at.gallery[model].lane.native
        bodies = [{**b, "prompt": " ".join(f"w{3 + (7 * k + i) % 80}" for i in range(3 + k % 5))} for k, b in enumerate(mixed(names, 10, longest=12))]
        for body in bodies:
            body.pop("stop", None)
        works = at.run(lambda: asyncio.gather(*(asked(at, **body) for body in bodies)))
        for body, (work, request) in zip(bodies, works, strict=True):
            expected = alone(served_models, body["model"], work, work.drafts[0].decoding, len(work.drafts), request.seed, model)  # fmt: skip
            assert [d.ids for d in work.drafts] == [e.ids for e in expected], body
            for draft, one in zip(work.drafts, expected, strict=True):
                np.testing.assert_allclose(draft.raw[: len(one.raw)], one.raw, atol=2e-5)


def test_adapters_that_are_no_plain_lora_are_served_apart(served_models: Path) -> None:
    with here(served_models, ["base"], ("dora", "scaled", "soft", "witty"), slots=4) as at:
        lanes = {name: at.gallery[name].lane for name in at.gallery.served}
        assert lanes["witty"] is lanes["base"] and len({id(lane) for lane in lanes.values()}) == 4
        assert any("«dora» is decoded apart" in notice for notice in at.gallery.notices)
        assert at.gallery["soft"].context == 400 - 5
        bodies = mixed(("dora", "base", "scaled", "soft", "witty"), 15, longest=25)
        for body, (work, request) in zip(bodies, at.run(lambda: asyncio.gather(*(asked(at, **b) for b in bodies))), strict=True):
            check(served_models, body["model"], work, request)


def test_what_cannot_be_served_is_said_at_the_start(served_models: Path) -> None:
    with pytest.raises(ModelError, match="trained on another base"), here(served_models, ["base"], ("foreign",)):
        pass


@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_lora_of_other_kinds_of_layers_in_one_batch(model: str, served_models: Path) -> None:
    """GPT-2's layers hold their weights the other way round; a mixture's see the tokens of all rows as one list."""
    name = f"on-{model}"
    with here(served_models, [model], (name,), slots=4) as at:
        lane = at.gallery[name].lane
        assert lane.native and lane is at.gallery[model].lane, lane.reason
        bodies = [{**b, "prompt": " ".join(f"w{3 + (7 * k + i) % 80}" for i in range(3 + k % 5))} for k, b in enumerate(mixed((model, name), 10, 40))]
        for body, (work, request) in zip(bodies, at.run(lambda: asyncio.gather(*(asked(at, **b) for b in bodies))), strict=True):
            check(served_models, body["model"], work, request, model)
