"""Scores of the one `Policy` against the plain model: every sequence alone, through the model's own `.logits`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from temper.errors import ModelError
from temper.losses import nll
from temper.models import proof, scores, segments
from temper.models.attention import tree_mask
from temper.models.proof import check_causal, prove
from temper.models.scores import Policy
from temper.trees import Node, Row, chain, flatten, group, join, rounded, stack
from tiny_models import LOOK_AHEAD, PADDED, TREES, VOCABULARY, WINDOW, build, warmed

NATS = 1e-5  # largest difference of a log-probability, float32; the models' log-probabilities reach 10 nats
RELATIVE = 1e-5  # of gradients, against their norm


def forest() -> Row:
    """Two lanes of trees with prompts and paths longer than the window, scored tokens in trunk and branches."""
    draw = torch.Generator().manual_seed(7)

    def node(n: int, *children: Node, scored: bool = True) -> Node:
        ids = torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()
        weights = (torch.rand(n, generator=draw) + 0.5).tolist() if scored else None
        return Node(ids, weights, children)

    deep = node(11, node(4, node(5), node(3)), node(6), scored=False)
    wide = node(10, node(4), node(2), node(1))
    return stack([[flatten(deep), chain(list(range(5, 12)), [0, 0, 1, 1, 1, 0.5, 1])], [flatten(wide)]])


def one_by_one(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities of the scored tokens [S]: each branch a sequence of its own, no mask and no positions given."""
    out = []
    for tree in row.trees:
        lines = [tree.path(b) for b in range(len(tree.tips))]
        logps = []
        for at in lines:
            logits = model(input_ids=torch.tensor(tree.ids[at], dtype=torch.long)[None], use_cache=False).logits[0]
            logps.append(logits.float().log_softmax(-1))
        for tgt, branch in zip(tree.tgt.tolist(), tree.branch.tolist(), strict=True):
            depth = int(tree.pos[tgt])
            out.append(logps[branch][depth - 1, int(tree.ids[tgt])])
    return torch.stack(out)


def gradients(value: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    wanted = [p for p in parameters if p.requires_grad]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(wanted, found, strict=True)])


def compare(
    model: Any,
    row: Row,
    layouts: Iterable[scores.Layout] = ("tree", "padded"),
    *,
    slack: float = 1,
    pieces: bool = False,
) -> dict[str, float]:
    """Policy in each layout against the model itself; returns the largest differences."""
    expected = one_by_one(model, row)[-len(row.tgt) :]  # of a row that scores its last tokens alone, those
    slope = gradients((expected * row.weight).sum(), model.parameters())
    assert expected.std() > 1, "flat models hide errors"
    assert slope.norm() > 0
    worst = {"logp": 0.0, "gradient": 0.0}
    for layout in layouts:
        policy = Policy(model, layout)
        policy.segments = pieces
        got = policy(row)
        assert got.dtype == torch.float32 and got.shape == row.tgt.shape
        error = (got - expected).abs().max().item()
        tilt = gradients((got * row.weight).sum(), model.parameters())
        relative = ((tilt - slope).norm() / slope.norm()).item()
        assert error < slack * NATS and relative < slack * RELATIVE, (
            f"{layout}: {error:.1e} nats, gradient {relative:.1e}"
        )
        worst = {"logp": max(worst["logp"], error), "gradient": max(worst["gradient"], relative)}
    return worst


def with_adapter(model: Any) -> Any:
    """LoRA on every linear layer, not at its start: B is drawn too."""
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return warmed(wrapped, 0.1).eval()


@pytest.mark.parametrize("family", TREES)
def test_trees_and_padding_equal_single_sequences(family: str) -> None:
    row = forest()
    assert max(t.depth for t in row.trees) > 2 * WINDOW
    model = build(family)
    proof = prove(Policy(model))
    assert proof["layout"] == "tree" and proof["difference"] < 1e-5 < 1 < proof["control"]
    compare(model, row)


@pytest.mark.parametrize("family", TREES)
@pytest.mark.parametrize(
    "set_to",
    [
        {},
        {"LEAST": 6, "SMALL": 6},
        {"LEAST": 6, "SMALL": 6, "KEPT": 0},
        {"LEAST": 6, "LONG": 0, "BLOCK": 6, "STEP": 1},
        {"LONG": 0, "BLOCK": 4, "STEP": 2, "KEPT": 0},
        {"LEAST": 6, "LONG": 0, "BLOCK": 6, "STEP": 1, "MOST": 0},
    ],
)
def test_attention_by_segments(family: str, set_to: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment of all trees, or a segment of each and small blocks, some along branches; by products that keep their
    probabilities or compute them again, or by the kernel; and a lane's padding is left out."""
    for name, value in set_to.items():
        monkeypatch.setattr(segments, name, value)
    model, row = build(family), forest()
    policy = Policy(model)
    prove(policy)
    if model.config._attn_implementation != "sdpa":
        return
    assert policy.segments != family.startswith("falcon"), "the proof finds that falcon has attention of its own"
    if not policy.segments:
        return
    compare(model, row, ["tree"], pieces=True)
    lanes = stack([[t] for t in row.trees])
    assert len(segments.in_line(lanes).ids) < len(lanes.ids) or len(row.trees) == 1
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model, lanes, ["tree"], pieces=True)


def test_blocks_of_a_long_segment_follow_its_branches() -> None:
    """A prompt of 600 tokens with eight completions of 125: a block of one sees the prompt and little of its siblings; each
    query is in one block, with all that it sees."""
    prompt, answers = list(range(1, 601)), [list(range(1000 * k, 1000 * k + 125)) for k in range(1, 9)]
    row = join([group(prompt, answers)])
    carried = segments.carrier(row, lambda b, h, q, k: (q >= 0) & (k >= 0))
    found: Any = carried.segments
    (seen,), (cut,) = found.visible, found.blocks(2, 4, torch.float32, last=False)
    assert len(seen) > segments.LONG and all(block.plain for block in cut)
    begin, given = 0, 0
    for block in cut:
        keys = torch.arange(block.keys) if isinstance(block.keys, int) else block.keys
        asked = seen[begin : begin + block.queries]
        assert (block.mask[: block.queries] == 0).equal(asked[:, keys])
        assert asked.sum() == asked[:, keys].sum(), "something that is seen is not among the keys"
        begin, given = begin + block.queries, given + block.queries * len(keys)
    assert begin == len(seen)
    assert given < 1.25 * (seen.sum() + 600**2 / 4), "completions meet their siblings"
    (read,) = found.read
    last = found.blocks(2, 4, torch.float32, last=True)[0]
    assert sum(block.queries for block in last) == len(read) and len(last) > 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_attention_that_keeps_its_probabilities_is_as_exact_in_half_precision(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast queries come in float32 and values in half; its scores are float32, as the kernel's are."""
    model, row = build(family), forest()
    exact = one_by_one(model, row)
    slope = gradients((exact * row.weight).sum(), model.parameters())
    far = {}
    for kept in (512, 0):
        monkeypatch.setattr(segments, "MOST", kept * 10**6)
        with torch.autocast("cpu", torch.bfloat16):
            policy = Policy(model)
            prove(policy)
            assert policy.segments
            got = policy(row)
        tilt = gradients((got * row.weight).sum(), model.parameters())
        far[kept] = [float(((a - b).norm() / b.norm()).detach()) for a, b in ((got, exact), (tilt, slope))]
    for kept, kernel in zip(far[512], far[0], strict=True):
        assert kept < 1.3 * kernel < 0.2


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "granite"])
def test_the_last_layer_is_computed_only_where_it_is_read(family: str) -> None:
    """Of three tokens, as of the few that a reward model reads, and of a forest's."""
    model, row = build(family), forest()
    few = dataclasses.replace(row, src=row.src[-3:], tgt=row.tgt[-3:], weight=row.weight[-3:], branch=row.branch[-3:])
    for pieces in (False, True):
        compare(model, few, ["tree"], pieces=pieces)
    seen: list[int] = []
    inner = next(segments._at_the_end(model.base_model)[0].children())
    inner.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2).shape[0]))
    with torch.no_grad():
        Policy(model, "tree")(few)
        Policy(model, "tree")(row)
    assert seen == [len(few.src.unique()), len(row.src.unique())]


@pytest.mark.parametrize("family", TREES)
def test_eager_attention_too(family: str) -> None:
    model = build(family, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert prove(Policy(model))["layout"] == "tree"
    compare(model, forest(), ["tree"])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following .*_pattern keys")  # PEFT, GPT-2 and MoE
@pytest.mark.parametrize("family", TREES)
def test_activation_checkpointing_and_adapters(family: str) -> None:
    model = with_adapter(build(family))
    compare(model, forest(), ["tree"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert prove(Policy(model))["layout"] == "tree" and model.training
    compare(model, forest(), ["tree"])


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_checkpointing_of_the_whole_model(family: str) -> None:
    model = build(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model.train(), forest())


@pytest.mark.parametrize("family", PADDED)
def test_models_that_no_tree_fits_are_padded(family: str) -> None:
    policy = Policy(build(family))
    proof = prove(policy, length=40)
    assert proof["layout"] == policy.layout == "padded" and proof["reason"]
    compare(policy.hf, forest(), ["padded"], slack=3)  # Mamba sums over time: a wider batch rounds otherwise


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt_neo", "lfm2", "mamba"])
def test_the_proof_alone_would_find_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a model's kind not known, comparing the passes says the same."""
    monkeypatch.setattr(proof, "refuses_trees", lambda model: None)
    policy = Policy(build(family))
    found = prove(policy, length=400)
    assert found["layout"] == policy.layout == "padded"
    assert "differs" in found["reason"] or "failed" in found["reason"]


@pytest.mark.parametrize("family", LOOK_AHEAD)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(family: str) -> None:
    """Its loss would fall to nothing, and it could not write a word."""
    policy = Policy(build(family))
    assert prove(policy)["layout"] == "padded"
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        check_causal(policy)


@pytest.mark.parametrize("family", [*TREES, *PADDED])
def test_causal_models_pass(family: str) -> None:
    policy = Policy(build(family))
    check_causal(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_causal(policy)
    assert policy.layout == "tree"


def test_a_window_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for layers of two kinds: the error that transformers takes without a word."""
    model = build("gemma3")

    def one_mask(model: Any, row: Row, dtype: torch.dtype, **more: Any) -> Any:
        made = tree_mask(model, row, dtype, **more)
        assert isinstance(made, dict)
        return {name: made["full_attention"] for name in made}

    monkeypatch.setattr(scores, "tree_mask", one_mask)
    assert prove(Policy(model))["layout"] == "padded"
    with pytest.raises(AssertionError, match="nats"):
        compare(model, forest(), ["tree"])


def three_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Heads make the logits of three positions at once from here on; the list says of how many, each time."""
    sizes: list[int] = []
    head_of = scores.head_of

    def watched(model: Any) -> Any:
        backbone, head = head_of(model)

        def head_and_note(*, inputs_embeds: torch.Tensor, **rest: Any) -> Any:
            sizes.append(inputs_embeds.shape[1])
            return head(inputs_embeds=inputs_embeds, **rest)

        return backbone, head_and_note

    monkeypatch.setattr(scores, "CHUNK_LOGITS", 3 * VOCABULARY + 1)
    monkeypatch.setattr(scores, "head_of", watched)
    return sizes


def test_a_vocabulary_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    row, model = forest(), build("gemma2")
    expected = Policy(model)(row)
    slope = gradients(expected.sum(), model.parameters())
    sizes = three_at_a_time(monkeypatch)
    with torch.no_grad():
        assert torch.allclose(Policy(model)(row), expected, atol=1e-6)
    assert max(sizes) == 3 and sum(sizes) == rounded(len(row.tgt))
    compare(model, row)
    assert torch.allclose(gradients(Policy(model)(row).sum(), model.parameters()), slope, rtol=1e-4, atol=1e-5)


def test_a_policy_has_the_parameters_of_its_model_once() -> None:
    model = build("llama")
    policy = Policy(model)
    policy(forest())
    assert [id(p) for p in policy.parameters()] == [id(p) for p in model.parameters()]
    assert set(policy.state_dict()) == {f"hf.{name}" for name in model.state_dict()}


def examples() -> tuple[list[list[int]], list[int]]:
    """Six sequences and the lengths of their prompts."""
    draw = torch.Generator().manual_seed(11)
    lengths, prompts = [9, 17, 5, 23, 12, 14], [3, 9, 1, 15, 11, 6]
    return [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths], prompts


def ours(model: Any, layout: scores.Layout = "tree") -> tuple[float, torch.Tensor]:
    """The loss that supervised fine-tuning takes of the examples, two lanes to a row, and its gradient."""
    trees = [chain(ids, [0.0] * n + [1.0] * (len(ids) - n)) for ids, n in zip(*examples(), strict=True)]
    row = stack([trees[:3], trees[3:]])
    terms = nll(Policy(model, layout)(row), row.weight)
    loss = (terms.values * terms.weights).sum() / terms.weights.sum()
    return loss.item(), gradients(loss, model.parameters())


def padded_batch() -> dict[str, torch.Tensor]:
    sequences, prompts = examples()
    width = max(map(len, sequences))
    ids, labels = torch.zeros(len(sequences), width, dtype=torch.long), torch.full((len(sequences), width), -100)
    mask = torch.zeros_like(ids)
    for k, (line, n) in enumerate(zip(sequences, prompts, strict=True)):
        ids[k, : len(line)] = torch.tensor(line)
        labels[k, n : len(line)] = torch.tensor(line[n:])
        mask[k, : len(line)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mistral", "granite", "falcon rope"])
def test_sft_equals_the_labels_loss_of_transformers(family: str) -> None:
    model = build(family)
    theirs = model(**padded_batch(), use_cache=False).loss
    slope = gradients(theirs, model.parameters())
    for layout in ("tree", "padded"):
        loss, tilt = ours(model, layout)
        assert loss == pytest.approx(theirs.item(), rel=1e-6)
        assert (tilt - slope).norm() / slope.norm() < RELATIVE


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore")
def test_sft_equals_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = build("llama")
    expected, slope = ours(model)
    sequences, prompts = examples()
    words = {f"w{i}": i for i in range(VOCABULARY)}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w2", bos_token="w1"
    )
    rows = Dataset.from_dict(
        {
            "input_ids": sequences,
            "completion_mask": [[0] * n + [1] * (len(s) - n) for s, n in zip(sequences, prompts, strict=True)],
        }
    )
    settings = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(sequences), use_cpu=True, report_to="none",
        max_length=None, completion_only_loss=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=plain)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    theirs = gradients(loss, trainer.model.parameters())
    assert (theirs - slope).norm() / slope.norm() < RELATIVE


def test_packed_examples_do_not_see_one_another() -> None:
    """Whatever stands beside an example in its row, its scores are those it has alone."""
    model = build("llama")
    ids = examples()[0]
    trees = [chain(line, [1.0] * len(line)) for line in ids]
    with torch.no_grad():
        alone = [Policy(model)(join([t])) for t in trees]
        for order in (trees, trees[::-1]):
            packed = Policy(model)(join(order)).split([len(t.tgt) for t in order])
            for tree, got in zip(order, packed, strict=True):
                assert torch.allclose(got, alone[ids.index(tree.ids.tolist())], atol=NATS)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_divergence_is_that_of_whole_distributions(family: str) -> None:
    """Against each sequence alone through the plain model, in float64; gemma2 caps its logits."""
    one, other = build(family), build(family)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    row = forest()
    found = Policy(one).divergence(Policy(other), row)
    expected = []
    for tgt in row.tgt.tolist():
        tree, start = next((t, s) for t, s in zip(row.trees, row.starts, strict=True) if s <= tgt < s + len(t))
        branch = next(b for b in range(len(tree.tips)) if tgt - start in tree.path(b).tolist())
        path = tree.path(branch)
        ids = torch.tensor(tree.ids[path[path < tgt - start]].tolist())[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (one, other))
        expected.append(float((p.exp() * (p - q)).sum()))
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    assert found.min() > 1e-3 and Policy(one).divergence(Policy(one), row).abs().max() < 1e-6
