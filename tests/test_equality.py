"""Cuts, neighbours, adapters and dropout, against transformers and PEFT on the same rows. See also test_scores.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.engine.settings import Training
from temper.engine.validation import Plan
from temper.errors import ModelError
from temper.hub import Source, identity
from temper.job import Job, Log
from temper.losses import nll
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.models.scores import Policy
from temper.trees import Node, Tree, chain, flatten, join, pack, rows_of, split, stack
from tiny_models import warmed

BASE: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GQA = {**BASE, "num_key_value_heads": 2}
MIXED = ["sliding_attention", "full_attention"] * 2

TREES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**GQA),
    "gemma3": lambda: tf.Gemma3TextConfig(**GQA, head_dim=16, sliding_window=8, layer_types=MIXED),
    "gpt2": lambda: tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2),
}


def made(config: Any, seed: int = 0) -> Any:
    """A model whose log-probabilities vary by nats, so that a wrong mask shows."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(7.0)
    return model.eval()


def forest(seed: int = 0) -> list[Tree]:
    """Two trees, three levels deep, seven leaves, paths beyond a window of 8, some inner tokens scored."""
    rng = np.random.default_rng(seed)

    def node(n: int, children: tuple[Node, ...] = (), scored: bool = True) -> Node:
        return Node(rng.integers(3, 128, n).tolist(), [1.0 if scored else 0.0] * n, children)

    first = node(11, (node(4, (node(5), node(3))), node(6), node(2, (node(7), node(1)))), scored=False)
    return [flatten(first, "a"), flatten(node(9, (node(5), node(4), node(8))), "b")]


def separately(model: Any, trees: list[Tree]) -> torch.Tensor:
    """Log-probabilities of the scored tokens from every path alone through the model's own logits."""
    out = []
    for tree in trees:
        logps = {}
        for b in range(len(tree.tips)):
            path = tree.path(b)
            ids = torch.from_numpy(tree.ids[path].astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            for k in range(1, len(path)):
                logps.setdefault(int(path[k]), logits[k - 1, ids[0, k]])
        out += [logps[int(t)] for t in tree.tgt]
    return torch.stack(out)


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert a.keys() == b.keys()
    gap = sum(float((a[n] - b[n]).double().pow(2).sum()) for n in a)
    return math.sqrt(gap / sum(float(g.double().pow(2).sum()) for g in b.values()))


def examples(n: int = 12, seed: int = 1) -> tuple[list[list[int]], list[list[float]]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 128, int(rng.integers(6, 40))).tolist() for _ in range(n)]
    return ids, [[0.0] * (len(i) // 2) + [1.0] * (len(i) - len(i) // 2) for i in ids]


def padded_batch(ids: list[list[int]], weights: list[list[float]]) -> dict[str, torch.Tensor]:
    width = max(map(len, ids))
    batch = {k: torch.zeros(len(ids), width, dtype=torch.long) for k in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(ids), width), -100)
    for k, (i, w) in enumerate(zip(ids, weights, strict=True)):
        batch["input_ids"][k, : len(i)] = torch.tensor(i)
        batch["attention_mask"][k, : len(i)] = 1
        batch["labels"][k, : len(i)] = torch.where(torch.tensor(w) > 0, torch.tensor(i), -100)
    return batch


def looped(tmp_path: Path, model: Any, trees: list[Tree], **fields: Any) -> Loop:
    """A real loop with a real job."""
    from temper import recipe as recipes

    file = tmp_path / "r.yaml"
    file.write_text("name: r\nmodel: ./none\nstages:\n  d: {stage: data, source: 'mini:uk-news', text: '{text}'}\n")
    training = Training(**{"lr": 1e-3, "batch_size": len(trees), **fields})
    job = Job(recipes.load(file), "d", tmp_path, {}, Log(None, quiet=True))
    job.start_clock()
    batches = Batches(trees, training.batch_size * training.accumulation, training.row_tokens, training.micro_tokens, 0)
    return Loop(job, Policy(model), nll, batches, training, "float32")


def test_sft_loss_and_gradients_are_those_of_labels_however_the_batch_is_cut(tmp_path: Path) -> None:
    """Silence 4, and transformers' padded `labels` loss on the same rows."""
    import temper.stages  # noqa: F401

    model = made(TREES["llama"]())
    ids, weights = examples()
    out = model(**padded_batch(ids, weights))
    wanted = gradients(model, out.loss)
    trees = [chain(i, w, f"row {k}") for k, (i, w) in enumerate(zip(ids, weights, strict=True))]
    for row_tokens, micro_tokens in ((16, 16), (64, 64), (64, 256), (4096, 4096)):
        loop = looped(tmp_path, model, trees, row_tokens=row_tokens, micro_tokens=micro_tokens)
        loss, _ = loop.gradients(loop.batches.rows(0))
        got = {n.removeprefix("hf."): p.grad.clone() for n, p in loop.policy.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        assert loss == pytest.approx(out.loss.item(), rel=1e-6)
        assert apart(got, wanted) < 1e-5


def test_neighbours_in_a_row_do_not_see_each_other() -> None:
    """Silence 5: other tokens in one example leave the other's log-probabilities bit-equal."""
    policy = Policy(made(TREES["gemma3"]()))
    a, b = forest()
    other = Tree(**{**b.__dict__, "ids": (b.ids + 7) % 125 + 3})
    with torch.no_grad():
        for lanes in ([[a, b]], [[b, a]], [[a], [b]]):
            one, two = (policy(stack([[x if x is a else y for x in lane] for lane in lanes])) for y in (b, other))
            first = lanes[0][0] is a
            mine = slice(0, len(a.tgt)) if first else slice(len(b.tgt), None)
            theirs = slice(len(a.tgt), None) if first else slice(0, len(b.tgt))
            assert torch.equal(one[mine], two[mine])
            assert not torch.allclose(one[theirs], two[theirs])


def test_splitting_and_packing_keep_every_scored_token(tmp_path: Path) -> None:
    policy = Policy(made(TREES["llama"]()))
    for tree in forest():
        whole = sorted(zip(tree.ids[tree.tgt].tolist(), policy(join([tree])).tolist(), strict=True))
        parts = split(tree, 24)
        assert len(parts) > 1 and all(len(p) <= 24 for p in parts)
        pieces = sorted(
            pair for p in parts for pair in zip(p.ids[p.tgt].tolist(), policy(join([p])).tolist(), strict=True)
        )
        assert [i for i, _ in whole] == [i for i, _ in pieces]
        assert np.allclose([x for _, x in whole], [x for _, x in pieces], atol=2e-5)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 300, 200).tolist()
    rows = pack(sizes, 256)
    assert sorted(i for r in rows for i in r) == list(range(200))
    assert all(len(r) == 1 or sum(sizes[i] for i in r) <= 256 for r in rows)
    trees = [chain(list(range(3, 3 + min(n, 120))), [1.0] * min(n, 120)) for n in sizes]
    assert sum(len(r.tgt) for r in rows_of(trees, 128, 512)) == sum(len(t.tgt) for t in trees)


def test_an_adapter_begins_as_nothing_merges_exactly_and_is_pefts(tmp_path: Path) -> None:
    """Lines 10 and 21: a merge that changes nothing, and an adapter on another base, are refused."""
    folder, other = tmp_path / "base", tmp_path / "other"
    made(TREES["llama"]()).save_pretrained(folder)
    made(TREES["llama"](), seed=5).save_pretrained(other)
    source = Source(str(folder))
    row = join(forest())
    base, _ = load.model(source)
    before = Policy(base)(row).detach()
    model = adapters.attach(base, Adapter(r=4, dora=False), seed=3)
    assert torch.equal(Policy(model)(row), before)
    with pytest.raises(ModelError, match="merging changed nothing"):
        adapters.merged(adapters.attach(load.model(source)[0], Adapter(r=4), seed=3))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    warmed(model, 0.1)
    tuned = Policy(model)(row).detach()
    assert (tuned - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(Policy(model)(row), before)
    adapters.save(model, tmp_path / "adapter", source, stage=None, identity=identity(source))
    theirs = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    assert torch.allclose(separately(theirs.eval(), forest()), tuned, atol=2e-5)
    again, _ = adapters.open_model(Source(str(folder), adapters=(str(tmp_path / "adapter"),)))
    assert torch.allclose(Policy(again.eval())(row), tuned, atol=1e-6)
    with pytest.raises(ModelError, match="another base"):
        adapters.open_model(Source(str(other), adapters=(str(tmp_path / "adapter"),)))
    merged, change = adapters.merged(model)
    assert change > 0
    assert torch.allclose(Policy(merged)(row), tuned, atol=1e-5, rtol=1e-5)


def test_a_forward_put_on_the_instance_is_not_the_heads() -> None:
    """TRL and accelerate put a bound `forward` on the model; the head would run the whole model with it."""
    model = made(TREES["llama"]())
    row = join(forest())
    before = Policy(model)(row)
    model.forward = model.forward
    assert torch.equal(Policy(model)(row), before)


def test_targets_that_match_nothing_name_what_there_is() -> None:
    with pytest.raises(ModelError, match="q_proj"):
        adapters.attach(made(TREES["llama"]()), Adapter(targets=["q_prj"]), seed=0)


def test_dropout_is_off_where_it_must_be(tmp_path: Path) -> None:
    """Silence 24: GPT-2 has dropout of 0.1; validation twice gives one number, training does not."""
    import temper.stages  # noqa: F401

    model = made(TREES["gpt2"]())
    ids, weights = examples(4)
    trees = [chain(i, w) for i, w in zip(ids, weights, strict=True)]
    loop = looped(tmp_path, model, trees)
    loop.plan = Plan(1, rows_of(trees, 64, 64), [], 0.0)
    with torch.no_grad():
        expected = model.eval()(**padded_batch(ids, weights)).loss.item()
    loop.policy.train()
    assert loop.validation_loss() == pytest.approx(expected, rel=1e-6) == loop.validation_loss()
    torch.manual_seed(1)
    assert abs(loop.gradients(loop.batches.rows(0))[0] - expected) > 1e-4
