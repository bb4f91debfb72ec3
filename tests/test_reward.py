"""Reward models: the loss against TRL's trainer, trees against padded passes, what is saved, drawn pairs, bad input."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import temper
from staged_runs import Workshop, copy_stages, lines_of, weights
from temper.data.forms import Format
from temper.errors import DataError, ModelError, RecipeError, TemperError
from temper.hub import Source
from temper.losses import bradley_terry
from temper.models import products
from temper.models.reward import RewardModel, pair, with_end
from temper.recipe import load
from temper.rewards import Given, compute, read
from temper.runfolder import read_json
from temper.stages import pairs
from temper.stages.reward import accuracy, right_signs
from temper.trees import join, rows_of
from temper.types import Record
from tiny_models import TREES, VOCABULARY, sharpen

ROWS = {
    "stage": "data", "source": "mini:uk-toxic-sentences", "split": "train", "take": 60, "text": "{text}", "label": "{label}",
    "validation": 12, "test": 12, "near_leaks": False,
}  # fmt: skip
RM = {"stage": "reward", "data": "rows", "positive": "clean", "batch_size": 8, "lr": 2e-3, "evaluate_every": 3}


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = [(draw(9 + k, k) + draw(3 + k, 10 + k), draw(9 + k, k) + draw(7 - k, 20 + k)) for k in range(5)]


def words() -> PreTrainedTokenizerFast:
    """w5 is token 5; the padding token is 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


def scorer(family: str, labels: int = 1) -> Any:
    kind, settings = TREES[family]
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings, num_labels=labels))
    sharpen(model)
    return model.eval()


def reward_model(family: str) -> RewardModel:
    model = RewardModel(scorer(family), words())
    assert model.settle("auto", 32)["layout"] == "tree"
    return model


def gradients(model: RewardModel, row_tokens: int, micro_tokens: int, **options: float) -> tuple[float, dict[str, Any]]:
    rows = rows_of([pair(a, b, share=model.layout == "tree") for a, b in PAIRS], row_tokens, micro_tokens)
    total = torch.zeros(())
    for row in rows:
        terms = bradley_terry(model(row), row.weight, **row.extra, **options)
        total = total + (terms.values * terms.weights).sum() / len(PAIRS)
    model.hf.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
def test_trees_have_the_padded_passes_rewards_and_gradients(family: str) -> None:
    model = reward_model(family)
    value, tree = gradients(model, 32, 64)
    model.layout = "padded"
    other, padded = gradients(model, 16, 10_000)
    assert value == pytest.approx(other, abs=1e-5) and abs(value - math.log(2)) > 1e-3
    assert set(tree) == set(padded)
    for name, gradient in tree.items():
        torch.testing.assert_close(gradient, padded[name], atol=2e-5, rtol=1e-3)


def test_rewards_go_through_the_same_products_as_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = reward_model("llama"), []
    usual = products.product

    def counted(*args: Any) -> torch.Tensor:
        taken.append(args[0].shape)
        return usual(*args)

    monkeypatch.setattr(products, "product", counted)
    with torch.no_grad():
        model(rows_of([pair(*both) for both in PAIRS], 512, 512)[0])
    assert bool(taken) == products.sound(torch.float32)


def test_a_row_gives_each_text_the_reward_that_it_has_alone_in_float64() -> None:
    model = reward_model("llama")
    lines = [line for both in PAIRS for line in both]
    exact = model.hf.double()
    with torch.no_grad():
        alone = np.array([exact(input_ids=torch.tensor([line])).logits[0, 0].item() for line in lines])
    model.hf.float()
    [row] = rows_of([pair(*both) for both in PAIRS], 512, 512)
    assert len(row.ids) < 512 + 1 and row.tokens < sum(map(len, lines))  # what a pair shares stands once
    found = model(row).tolist()
    at = {line: value for line, value in zip(map(tuple, lines), alone, strict=True)}
    expected = [at[tuple(tree.ids[tree.path(b)].tolist())] for tree in row.trees for b in (0, 1)]
    assert found == pytest.approx(expected, abs=1e-5) and np.ptp(alone) > 0.5
    assert model.score(lines, batch_tokens=40) == pytest.approx(alone, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_the_loss_and_its_gradient_equal_trls(centre: float, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = reward_model("qwen2")
    columns = {"chosen_ids": [a for a, _ in PAIRS], "rejected_ids": [b for _, b in PAIRS]}
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False,
        center_rewards_coefficient=centre or None,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=model.hf, args=arguments, processing_class=words(), train_dataset=datasets.Dataset.from_dict(columns)
    )
    batch = trainer.data_collator([{k: v[i] for k, v in columns.items()} for i in range(len(PAIRS))])
    model.hf.zero_grad()
    theirs = trainer.compute_loss(model.hf, dict(batch))
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}
    value, ours = gradients(model, 32, 64, centre=centre)
    assert value == pytest.approx(theirs.item(), abs=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


def test_the_loss_by_hand() -> None:
    """Two pairs, a margin: −ln σ(1 − 0.5) and −ln σ(−2 − 0), the first with 0.1·(2 + 1)² beside."""
    scores, weight = torch.tensor([2.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, 3.0])
    terms = bradley_terry(scores, weight, torch.tensor([0.5, 0.0]), centre=0.1)
    expected = [math.log(1 + math.exp(-0.5)) + 0.9, math.log(1 + math.exp(2))]
    assert terms.values.tolist() == pytest.approx(expected, abs=1e-6)
    assert terms.extras["accuracy"].tolist() == [1.0, 0.0] and terms.weights is weight
    assert bradley_terry(torch.tensor([1e4, -1e4]), torch.ones(1)).values.tolist() == [0.0]
    assert bradley_terry(torch.ones(2), torch.ones(1)).extras["accuracy"].tolist() == [0.5]


def test_a_pair_is_never_cut_in_two() -> None:
    rows = rows_of([pair(a, b) for a, b in PAIRS], 16, 16)
    assert sum(len(row.trees) for row in rows) == len(PAIRS)
    assert all(len(tree.tips) == 2 for row in rows for tree in row.trees)
    # one text may begin with the whole other one
    tree = pair([5, 6], [5, 6, 7])
    assert [tree.ids[tree.path(b)].tolist() for b in (0, 1)] == [[5, 6], [5, 6, 7]]
    assert [pair([5], [6]).tips.tolist(), pair([5], [6]).pos.tolist()] == [[0, 1], [0, 0]]


# Drawn pairs


def test_every_text_is_drawn_equally_often_and_pairs_follow_from_their_number() -> None:
    preferred = np.array([True] * 7 + [False] * 5)
    every = pairs.draw(20, range(70), preferred)
    chosen, rejected = Counter(a for a, _ in every), Counter(b for _, b in every)
    assert set(chosen.values()) == {10} and set(rejected.values()) == {14}
    assert set(chosen) == set(range(7)) and set(rejected) == set(range(7, 12))
    assert pairs.draw(20, [33, 4], preferred) == [every[33], every[4]]
    assert pairs.draw(21, range(70), preferred) != every
    assert len(set(every)) > 20, "the same few pairs again and again"
    part = Counter(a for a, _ in pairs.draw(20, range(3, 20), preferred))
    assert max(part.values()) - min(part.get(i, 0) for i in range(7)) <= 2


def test_held_out_accuracy_counts_every_pair() -> None:
    data = pairs.Coded([[1]] * 5, [""] * 5, np.array([True, False, True, False, False]), True, None)
    rewards = np.array([0.5, 0.5, -1.0, -2.0, 3.0])
    right = [(a > b) + (a == b) / 2 for a in rewards[data.preferred] for b in rewards[~data.preferred]]
    assert accuracy(rewards, data).value == pytest.approx(np.mean(right))
    assert right_signs(rewards, data).value == pytest.approx(2 / 5)  # 0.5 and −2.0
    paired = pairs.Coded([[1]] * 4, [""] * 4, np.array([True, False] * 2), False, None)
    assert accuracy(rewards[:4], paired).rows.tolist() == [0.5, 1.0]
    assert right_signs(rewards[:4], paired).rows.tolist() == [0.5, 0.5]


# The stage


def overrides(**fields: Any) -> dict[str, Any]:
    return {"threads": 1, "stages": {"rows": ROWS, "rm": {**RM, **fields}}}


@pytest.fixture(scope="module")
def trained(once: Callable[[str, Callable[[Path], None]], Path], smoke_run: Path, forks: Workshop) -> Path:
    """The smoke run with a reward model, what learns from it, and an evaluation that asks it and a classifier."""
    asks = {"reward_model": "rm", "decoding": {"max_new_tokens": 6, "temperature": 1.0}}
    stages = {
        "judge": {"stage": "classifier", "data": "rows", "batch_size": 8, "lr": 2e-3, "max_steps": 4},
        "learn": {
            "stage": "rl", "model": "base", "data": "news", "reward": [{"model": {}}], "completions": 2, "batch_size": 2,
            "max_steps": 1, **asks,
        },
        "weigh": {
            "stage": "evaluate", "data": "news", "models": ["base", "learn"], "metrics": ["reward"], "take": 6, **asks,
            "second_reward_model": "judge", "second_reward_label": "clean", "resamples": 200,
        },
    }  # fmt: skip
    made = overrides(centre=True, epochs=4, max_steps=None)
    made["stages"] |= stages

    def build(path: Path) -> None:
        copy_stages(smoke_run, path, "corpus", "tiny", "news")
        ended = forks.run(path, made, only=["weigh"])
        assert ended["status"] == 0, ended["traceback"]

    return once("reward-run", build)


def test_what_is_saved_scores_alike_in_transformers_alone_and_in_a_batch(trained: Path) -> None:
    folder = trained / "rm" / "model"
    table = pyarrow.parquet.read_table(trained / "rows" / "data" / "test.parquet").to_pylist()
    texts = [row["text"] for row in table]
    ours = RewardModel.open(Source(str(folder))).scores(texts)
    model, tok = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tok.pad_token_id
    model.eval()
    with torch.no_grad():
        alone = [model(**tok(t, return_tensors="pt")).logits.item() for t in texts]
        batch = model(**tok(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert ours == pytest.approx(alone, abs=1e-5) and ours == pytest.approx(batch, abs=1e-5)
    # its numbers on held-out texts, in the summary and beside it
    clean = np.array([row["label"] == "clean" for row in table])
    found = read_json(trained / "rm" / "reward.json")["splits"]["test"]
    right = [(a > b) + (a == b) / 2 for a in ours[clean] for b in ours[~clean]]
    assert found["accuracy"]["value"] == pytest.approx(np.mean(right)) and found["pairs"] == len(right)
    assert found["right_signs"]["value"] == pytest.approx(np.mean((ours > 0) == clean))
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    info = read_json(trained / "rm" / "stage.json")
    assert info["facts"]["test accuracy"] == round(found["accuracy"]["value"], 4) and "test: " in info["summary"]


def test_rewards_are_centred_in_what_is_saved(trained: Path) -> None:
    table = pyarrow.parquet.read_table(trained / "rows" / "data" / "train.parquet").to_pylist()
    model = RewardModel.open(Source(str(trained / "rm" / "model")))
    sides = [model.scores([r["text"] for r in table if r["label"] == name]) for name in ("clean", "toxic")]
    n = min(map(len, sides))
    even = np.mean([side[[k * len(side) // n for k in range(n)]].mean() for side in sides])
    assert even == pytest.approx(0, abs=1e-4)
    assert "has no bias" in read_json(trained / "rm" / "stage.json")["facts"]["centred"]


def test_an_evaluation_has_the_reward_of_prompt_and_answer_as_one_text(trained: Path) -> None:
    entry = read_json(trained / "weigh" / "evaluation.json")["models"]["base"]
    rows = pyarrow.parquet.read_table(trained / "weigh" / "rows.parquet").to_pydict()
    wholes = [f"{p}{a}" for p, a in zip(rows["prompt"], rows["base|prediction"], strict=True)]
    scorers = {
        "reward_mean": RewardModel.open(Source(str(trained / "rm" / "model"))),
        "second_reward_mean": RewardModel.open(Source(str(trained / "judge" / "model")), label="clean"),
    }
    for name, model in scorers.items():
        assert entry[name]["value"] == pytest.approx(np.mean(rows[f"base|{name}"]))
        found = model.scores([w.replace("<bos>", "") for w in wholes])
        assert np.corrcoef(found, rows[f"base|{name}"])[0, 1] > 0.9  # answers are shown without their outer spaces
    assert entry["reward_mean"]["signature"] != entry["second_reward_mean"]["signature"]
    assert entry["second_reward_mean"]["signature"].endswith("#clean")
    first = lines_of(trained / "learn" / "metrics.jsonl")[0]
    assert first["reward"] == first["reward_model"] and first["reward_std"] > 0


def test_a_cut_run_ends_as_one_that_was_not(forks: Workshop, trained: Path, tmp_path: Path) -> None:
    """Drawn pairs of three epochs, an adapter with dropout, the best weights kept."""
    fields = {"adapter": {"r": 4, "dropout": 0.1}, "pairs": 16, "epochs": 3, "checkpoint_every": 2, "centre": True}
    how: dict[str, Any] = {"overrides": overrides(**fields), "only": ["rm"]}
    whole = copy_stages(trained, tmp_path / "whole", "corpus", "tiny", "rows")
    ended = forks.run(whole, **how)
    assert ended["status"] == 0, ended["traceback"]
    moments = [m for m in ended["moments"] if "step-4" in m or "best-3" in m or "rm.partial/model" in m]
    folder = copy_stages(trained, tmp_path / "cut", "corpus", "tiny", "rows")
    died = [forks.run(folder, die_at=moment, **how)["status"] for moment in moments[:: max(1, len(moments) // 4)]]
    assert died.count(-signal.SIGKILL) >= 3
    assert forks.run(folder, **how)["status"] == 0
    assert weights(folder) == weights(whole)
    assert lines_of(folder / "rm" / "metrics.jsonl") == lines_of(whole / "rm" / "metrics.jsonl")
    assert read_json(folder / "rm" / "reward.json") == read_json(whole / "rm" / "reward.json")


def write(folder: Path, rows: list[dict[str, Any]], data: str, stage: str, model: Path) -> Path:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    (folder / "r.yaml").write_text(
        f"name: r\nmodel: {model}\nthreads: 1\nstages:\n  rows: {{stage: data, source: rows.jsonl, {data}}}\n"
        f"  rm: {{stage: reward, data: rows, {stage}}}\n",
        encoding="utf-8",
    )
    return folder / "r.yaml"


def test_an_encoder_learns_from_pairs_with_prompts(tmp_path: Path, trained: Path) -> None:
    """A fresh encoder on a task of one word, each text on its own line: all right on pairs it has not seen."""
    tok = AutoTokenizer.from_pretrained(trained / "tiny" / "model")
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    config = DistilBertConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **shape)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    tok.save_pretrained(tmp_path / "encoder")
    rng = np.random.default_rng(0)
    nouns = ["дощ", "сніг", "вітер", "ранок", "вечір", "місто", "поле", "ріка"]
    rows = [
        {"p": " ".join(rng.choice(nouns, 4)), "c": f"{rng.choice(nouns)} так", "r": f"{rng.choice(nouns)} ні"}
        for _ in range(120)
    ]
    data = 'prompt: "{p}", chosen: "{c}", rejected: "{r}", validation: 10, test: 20, near_leaks: false'
    how = "epochs: 6, batch_size: 8, lr: 3e-3, centre: true"
    folder = temper.run(write(tmp_path, rows, data, how, Path("./encoder")), out=tmp_path / "out", quiet=True)
    info = read_json(folder / "rm" / "stage.json")
    assert "texts end with" not in info["facts"]  # an encoder's head reads another token
    assert info["facts"]["test accuracy"] == 1 and info["facts"]["layout"] == "padded"
    assert "the head's bias" in info["facts"]["centred"] and abs(info["facts"]["test right signs"] - 1) < 0.2
    model = DistilBertForSequenceClassification.from_pretrained(folder / "rm" / "model").eval()
    ours = RewardModel.open(Source(str(folder / "rm" / "model")))
    text = f"{rows[0]['p']}\n{rows[0]['c']}"
    with torch.no_grad():
        alone = model(**tok(text, return_tensors="pt", return_token_type_ids=False)).logits.item()
    assert ours.scores([text, "дощ " * 20]).tolist()[0] == pytest.approx(alone, abs=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("rows", "data", "stage", "says"),
    [
        ([{"t": "a", "y": "pos"}, {"t": "b", "y": "pos"}], "labels", "positive: pos", "all 2 rows have the label «pos»"),
        ([{"t": "a", "y": "pos"}, {"t": "b", "y": "neg"}], "labels", "positive: poss", r"no row has the label «poss»[\s\S]*neg \(1\), pos \(1\)[\s\S]*did you mean «pos»"),
        ([{"t": "a", "y": "pos"}, {"t": "b", "y": "neg"}], "labels", "", r"not said which one is preferred[\s\S]*neg \(1\), pos \(1\)"),
        ([{"t": "a", "y": "pos"}, {"t": "a", "y": "neg"}], "labels", "positive: pos", r"1 texts stand both under[\s\S]*rows.jsonl:1 and .*rows.jsonl:2"),
        ([{"t": "a", "y": "pos"}, {"t": "b", "y": None}], "labels", "positive: pos", r"has no label[\s\S]*rows.jsonl:2"),
        ([{"t": "a"}, {"t": "b"}], "texts", "", "made of the columns chosen and rejected, or of text and label; these rows have text"),
        ([{"c": "a", "r": "b"}], "pairs", "positive: pos", "leave positive out"),
        ([{"c": "a", "r": "b"}], "pairs", "pairs: 4", "these rows are pairs already"),
        ([{"c": "a " * 500, "r": "b"}], "pairs", "", "no pair is left of 2 texts"),
    ],
)  # fmt: skip
def test_rows_that_no_reward_can_be_learnt_from(
    rows: list[dict[str, Any]], data: str, stage: str, says: str, tmp_path: Path, tiny_model: Path
) -> None:
    templates = {
        "pairs": 'chosen: "{c}", rejected: "{r}"', "labels": 'text: "{t}", label: "{y}"', "texts": 'text: "{t}"',
    }[data]  # fmt: skip
    file = write(tmp_path, rows, f"{templates}, drop: {{duplicates: off}}, validation: 0, test: 0", stage, tiny_model)
    with pytest.raises(TemperError, match=says):
        temper.run(file, out=tmp_path / "out", quiet=True)


def test_pairs_whose_texts_are_equal_are_named() -> None:
    """The data stage drops those that it sees; what reaches the stage all the same is an error with its rows."""
    rows = [Record({"chosen": "a b", "rejected": "a b" if k % 2 else "c"}, f"rows.jsonl:{k + 1}") for k in range(4)]
    with pytest.raises(DataError, match=r"2 of 4 pairs chosen equals rejected[\s\S]*rows.jsonl:2, rows.jsonl:4"):
        pairs.read(rows, Format(), words(), None)


@pytest.mark.parametrize("odd", [float("nan"), None, "big"])
def test_a_margin_that_is_no_number_is_told_with_its_row(odd: Any) -> None:
    def read(*margins: Any) -> pairs.Texts:
        rows = [Record({"chosen": "a", "rejected": f"b {k}", "margin": m}, f"r:{k}") for k, m in enumerate(margins)]
        return pairs.read(rows, Format(), words(), None)

    with pytest.raises(DataError, match=r"«margin» is no number in 1 of 3 pairs[\s\S]*r:1"):
        read(1, odd, 0.5)
    assert read(1, 0, 0.5).margins == [1, 0, 0.5] and read(None, None).margins is None


def test_long_texts_are_dropped_and_counted_or_cut_where_asked() -> None:
    texts = pairs.Texts(["a"] * 4, ["w"] * 4, np.array([True, False] * 2), False, [0.5, 1.5])
    ids = [[1, 2, 3], [4], [5, 6], [7]]
    dropped = pairs.coded(texts, ids, context=2, cut=None)
    assert dropped.ids == [[5, 6], [7]] and dropped.margins == [1.5]
    cut = pairs.coded(texts, ids, context=2, cut=lambda line: line[:2])
    assert cut.ids == [[1, 2], [4], [5, 6], [7]] and cut.margins == [0.5, 1.5]
    with pytest.raises(DataError, match="the same tokens to this model once they are cut to 1"):
        pairs.coded(texts, [[1, 2], [1, 3], [5], [7]], context=1, cut=lambda line: line[:1])


def test_several_labels_need_one_named_and_a_reward_must_be_a_number() -> None:
    tok = words()
    model = scorer("llama", 2)
    model.config.id2label = {0: "neg", 1: "pos"}
    with pytest.raises(ModelError, match=r"several labels and none is named[\s\S]*neg, pos[\s\S]*reward_label"):
        RewardModel(model, tok)
    with pytest.raises(ModelError, match=r"no label «good»; its labels are neg, pos[\s\S]*write reward_label: … with"):
        RewardModel(model, tok, label="good")
    made = RewardModel(model, tok, label="pos")
    text = "w5 w6 w7"
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
    assert made.scores([text, "w8"])[0] == pytest.approx(logits[1].item(), abs=1e-5) != logits[0].item()
    with pytest.raises(ModelError, match="is no name of it"):
        RewardModel(scorer("llama"), tok, label="pos")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"no number for 2 of 2 texts[\s\S]*w5 w6 w7"):
        made.scores([text, "w8"])
    given = Given(["w5"], ["w6"], [""], [Record({}, "rows.jsonl:7")], [[6]], None, ["w5 w6"], made.scores)
    with pytest.raises(ModelError, match=r"no number for 1 of 1 texts\nwhere: «w5 w6», rows.jsonl:7[\s\S]*float32$"):
        compute(read(["model"]), given)
    given = Given(
        ["w5"], ["w6"], [""], [Record({}, "rows.jsonl:7")], [[6]], None, ["w5 w6"], lambda texts: np.array([np.nan])
    )
    with pytest.raises(DataError, match=r"reward «model» gave nan[\s\S]*rows.jsonl:7"):
        compute(read(["model"]), given)


def test_a_text_that_ends_with_the_padding_token_is_read_to_its_end() -> None:
    model = reward_model("llama")
    model.check_ends([[5, 0], [6]])
    assert model.lines.pad in (1, 2) and model.hf.config.pad_token_id == model.lines.pad
    [row] = rows_of([pair([5, 0], [5, 6, 7])], 16, 16)
    assert model(row).tolist() == pytest.approx(model.score([[5, 0], [5, 6, 7]]).tolist(), abs=1e-5)
    with pytest.raises(ModelError, match="which also pads"):
        model.check_ends([[5, 0], [6, 1], [7, 2], [8, 3]])


def test_prompts_and_messages_are_written_out_as_a_policy_sees_them(trained: Path) -> None:
    tok = AutoTokenizer.from_pretrained(trained / "tiny" / "model")
    record = Record({"prompt": "Чому?", "chosen": "Бо так.", "rejected": "Не знаю."}, "rows.jsonl:3")
    assert pairs.whole(record, "chosen", Format(separator="\n- "), tok) == "Чому?\n- Бо так."
    said = [{"role": "user", "content": "Чому?"}], [{"role": "assistant", "content": "Бо так."}]
    messages = Record({"prompt": said[0], "chosen": said[1], "rejected": said[1]}, "rows.jsonl:4")
    with pytest.raises(DataError, match=r"no chat template[\s\S]*rows.jsonl:4"):
        pairs.whole(messages, "chosen", Format(), tok)
    tok.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    expected = "<bos>user: Чому?|assistant: Бо так.|"
    assert pairs.whole(messages, "chosen", Format(), tok) == expected == pairs.whole(record, "chosen", Format(), tok)
    whole = Record({"chosen": [*said[0], *said[1]], "rejected": []}, "rows.jsonl:5")
    assert pairs.whole(whole, "chosen", Format(), tok) == expected
    model = RewardModel.open(Source(str(trained / "rm" / "model")))
    assert model.lines.head == [tok.bos_token_id]
    [ids] = model.encode([expected])
    assert ids.count(tok.bos_token_id) == 1  # the tokenizer would put another one before the template's


@pytest.mark.parametrize(
    ("stage", "fields", "says"),
    [
        ("weigh", {"reward_model": None}, "asks a reward model, and none is named"),
        ("weigh", {"reward_model": "rmm"}, "did you mean «rm»"),
        ("weigh", {"reward_model": "rows"}, "«rows» gives no reward"),
        ("weigh", {"reward_model": "base"}, "the base model is no reward model"),
        ("weigh", {"metrics": ["rougeL"]}, "nothing asks it"),
        ("weigh", {"models": ["rm"]}, "«rm» gives no model"),
        ("learn", {"reward_model": None}, "the reward «model» asks a reward model, and none is named"),
        ("learn", {"reward": ["rouge"]}, "nothing asks it"),
        ("learn", {"reward": ["rouge"], "reward_model": None, "reward_label": "pos"}, "a label of no model"),
        ("rm", {"loss": {"bradley_terry": {"center": 0.1}}}, "did you mean «centre»"),
        ("rm", {"loss": "bradley"}, "did you mean «bradley_terry»"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(stage: str, fields: dict[str, Any], says: str) -> None:
    made = overrides()
    made["stages"] |= {
        "learn": {"stage": "rl", "model": "base", "data": "news", "reward": ["model"], "reward_model": "rm"},
        "weigh": {"stage": "evaluate", "data": "news", "models": ["base"], "metrics": ["reward"], "reward_model": "rm"},
    }
    made["stages"][stage] |= fields
    with pytest.raises(RecipeError, match=says):
        load("detox-summarization", profile="smoke", overrides=made)


def test_every_text_ends_with_the_end_token_also_after_saving(tmp_path: Path) -> None:
    """Whichever way a decoder's tokenizer is built; one that closes texts by itself, as encoders' do, stays as it is."""
    from tokenizers import processors

    plain, opened, closed = words(), words(), words()
    opened.backend_tokenizer.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    closed.backend_tokenizer.post_processor = processors.TemplateProcessing("w1 $A w2", None, [("w1", 1), ("w2", 2)])
    endless = words()
    endless.eos_token = None
    for made, expected, ends in (
        (plain, [7, 8, 2], True), (opened, [1, 7, 8, 2], True), (closed, [1, 7, 8, 2], True), (endless, [7, 8], False),
    ):  # fmt: skip
        made.backend_tokenizer.add_tokens(["a"])
        before = made("w7 w8")["input_ids"]
        changed, told = with_end(made)
        changed.save_pretrained(tmp_path / "saved")
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert (changed("w7 w8")["input_ids"], told) == (expected, ends)
        assert again("w7 w8")["input_ids"] == expected
        assert made("w7 w8")["input_ids"] == before  # the policy's own tokenizer is another object


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama2"])
def test_real_tokenizers_end_texts_too(name: str) -> None:
    folder = Path(__file__).parents[2] / "shared/data/tokenizers" / name
    if not folder.is_dir():
        pytest.skip("the tokenizers are not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    changed, ends = with_end(tokenizer)
    whole = tokenizer("a good film")["input_ids"]
    assert ends and changed("a good film")["input_ids"] == [*whole, tokenizer.eos_token_id]


def test_a_margin_reaches_the_loss() -> None:
    """The tree of a pair carries it as a column, and a row hands the column to the loss."""
    row = join([pair([1, 2, 3], [1, 4], margin=0.25), pair([1, 5], [1, 6, 7], margin=1.5)])
    assert row.extra["margin"].tolist() == [0.25, 1.5]
    assert not join([pair([1, 2, 3], [1, 4])]).extra
