"""Classifiers against transformers' own pipeline and plain passes of single texts in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from temper.data import mini
from temper.errors import ModelError
from temper.hub import Source
from temper.models.classify import Classifier, untrained
from temper.stages.pretrain import Shape, train_tokenizer
from tiny_models import sharpen

TEXTS = [row["text"] for row in mini.load("uk-toxic-sentences", split="test", rows=12)] + ["ні", "", "нездара " * 9]
PLACES = 128
SHAPE = Shape(vocabulary=600, context=PLACES)
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # dropout of 0.1 by default
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "xlm-roberta": {**_BERT, "max_position_embeddings": PLACES + 2},  # it counts from the padding token's id
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},  # reads its last place, padded or not
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([row["text"] for row in mini.load("uk-corpus", split="train", rows=60)], SHAPE)


def build(
    kind: str, tokenizer: Any, folder: Path, *, labels: Any = ("clean", "toxic"), pad: int | None = 0, **more: Any
) -> Source:
    """A sharpened model with its tokenizer on disk."""
    torch.manual_seed(3)
    settings = FAMILIES[kind] | ({} if kind in {"xlm-roberta", "xlnet"} else {"max_position_embeddings": PLACES})
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=pad, bos_token_id=1, eos_token_id=2,
        id2label=dict(enumerate(labels)), label2id={n: k for k, n in enumerate(labels)}, **settings, **more,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    sharpen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(str(folder))


def alone(source: Source, text: str, index: int = 1) -> float:
    """A single unpadded pass, in float64 where the model can."""
    model = AutoModelForSequenceClassification.from_pretrained(source.name).eval()
    if model.config.model_type != "xlnet":
        model.double()
    tok = transformers.AutoTokenizer.from_pretrained(source.name)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tok(text)["input_ids"]])).logits
    return float(logits.softmax(-1)[0, index])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_text_scores_as_it_does_alone(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    source = build(kind, tokenizer, tmp_path)
    judge = Classifier.open(source)
    found = judge.probability(TEXTS, batch_tokens=300)
    assert found.dtype == np.float64 and judge.windowed == 0 and not judge.training
    assert found == pytest.approx([alone(source, text) for text in TEXTS], abs=2e-5)
    assert np.ptp(found) > 0.1, "texts that all score alike would show nothing"
    # neither the batch nor the order changes a score
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert judge.probability([TEXTS[i] for i in order]) == pytest.approx(found[order], abs=2e-6)
    assert judge.together == (kind != "xlnet")
    assert bool(judge.notices) == (kind == "xlnet"), judge.notices


def test_it_is_the_pipelines_number(tokenizer: Any, tmp_path: Path) -> None:
    source = build("distilbert", tokenizer, tmp_path)
    pipe = transformers.pipeline("text-classification", source.name, device="cpu")
    theirs = pipe(TEXTS[:6], top_k=None, batch_size=3)
    expected = [next(d["score"] for d in one if d["label"] == "toxic") for one in theirs]
    assert Classifier.open(source).probability(TEXTS[:6], "Toxic") == pytest.approx(expected, abs=1e-6)


def test_a_decoder_without_a_padding_token_reads_the_same_last_token(tokenizer: Any, tmp_path: Path) -> None:
    """The token that would be taken, the end token, ends every text here: as padding it would be passed over."""
    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    around = {"single": "<bos> $A <eos>", "special_tokens": [("<bos>", 1), ("<eos>", 2)]}
    whole.post_processor = processors.TemplateProcessing(**around)
    ending = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<bos>", eos_token="<eos>")
    source = build("llama", ending, tmp_path, pad=None)
    judge = Classifier.open(source)
    assert judge.lines.tail == [2] and judge.lines.pad != 2
    assert judge.probability(TEXTS[:5]) == pytest.approx([alone(source, text) for text in TEXTS[:5]], abs=2e-5)


def test_one_label_and_several_labels_a_text_are_sigmoids(tokenizer: Any, tmp_path: Path) -> None:
    several = build(
        "llama", tokenizer, tmp_path / "m", labels=["insult", "toxic"], problem_type="multi_label_classification"
    )
    one = build("llama", tokenizer, tmp_path / "o", labels=["toxic"])
    for source, index in ((several, 1), (one, 0)):
        model = AutoModelForSequenceClassification.from_pretrained(source.name, dtype=torch.float64).eval()
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        expected = 1 / (1 + np.exp(-model(input_ids=ids).logits[0, index].item()))
        assert Classifier.open(source).probability(TEXTS[:1])[0] == pytest.approx(expected, abs=1e-5)
    assert Classifier.open(several).probabilities(TEXTS).sum(1) != pytest.approx(1)


def test_a_long_text_has_the_highest_of_its_windows(tokenizer: Any, tmp_path: Path) -> None:
    source = build("xlm-roberta", tokenizer, tmp_path)
    judge = Classifier.open(source)
    text = " ".join(TEXTS)
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert judge.lines.context == PLACES and len(body) > 3 * PLACES
    lines = judge.lines.windows([1, *body])
    covered = {k for n in range(len(lines)) for k in range(n * 63, n * 63 + len(lines[n]) - 1)}
    assert covered == set(range(len(body))) and all(len(line) <= PLACES and line[0] == 1 for line in lines)
    model = AutoModelForSequenceClassification.from_pretrained(source.name, dtype=torch.float64).eval()
    with torch.no_grad():
        each = [float(model(input_ids=torch.tensor([line])).logits.softmax(-1)[0, 1]) for line in lines]
    assert np.ptp(each) > 0.01
    assert judge.probability(["ні", text]) == pytest.approx([alone(source, "ні"), max(each)], abs=2e-5)
    assert judge.windowed == 1


@pytest.mark.parametrize(
    ("labels", "takes", "says"),
    [
        (["clean", "TOXIC"], 1, ""),
        (["non-toxic", "toxic"], 1, ""),
        (["not_toxic", "toxic_comment"], 1, "«toxic_comment» is taken for «toxic»"),
        (["LABEL_0", "LABEL_1"], None, "LABEL_0, LABEL_1"),
        (["toxicity_low", "toxicity_high"], None, "toxicity_low, toxicity_high"),
        (["neutral", "not_toxic"], None, "no label «toxic»"),
    ],
)
def test_the_label_is_found_or_those_there_are_are_told(
    labels: list[str], takes: int | None, says: str, tokenizer: Any, tmp_path: Path
) -> None:
    judge = Classifier.open(build("llama", tokenizer, tmp_path, labels=labels))
    if takes is None:
        with pytest.raises(ModelError, match=says):
            judge.probability(["так"])
    else:
        index, notice = judge.find("toxic")
        assert index == takes and (says in notice if says else notice == "")


def test_what_is_no_classifier_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.for_model("llama", vocab_size=600, pad_token_id=0, **FAMILIES["llama"])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        with pytest.raises(ModelError, match=r"is no classifier: it lacks score\.weight"):
            Classifier.open(Source(str(tmp_path / "lm")))
        with pytest.raises(ModelError, match="a number and no probability"):
            Classifier.open(build("llama", tokenizer, tmp_path / "r", labels=["x"], problem_type="regression"))
        with pytest.raises(ModelError, match="is an adapter"):
            Classifier.open(Source(str(tmp_path / "lm"), adapters=("somewhere",)))


def test_pickled_weights_are_read_with_a_notice(tokenizer: Any, tmp_path: Path) -> None:
    source = build("distilbert", tokenizer, tmp_path)
    expected = Classifier.open(source).probability(TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(source.name)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    judge = Classifier.open(source)
    assert "pickled" in judge.notices[0] and np.array_equal(judge.probability(TEXTS), expected)


def test_an_untrained_head_is_a_function_of_the_seed_and_the_body_is_the_bases(tokenizer: Any, tmp_path: Path) -> None:
    source = build("distilbert", tokenizer, tmp_path, labels=["a", "b", "c"])
    one, two, other = (untrained(source, ["clean", "toxic"], seed=seed)[0].state_dict() for seed in (1, 1, 2))
    base = AutoModelForSequenceClassification.from_pretrained(source.name).state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        if name.startswith("distilbert."):
            assert torch.equal(tensor, base[name])
    assert one["classifier.weight"].shape == (2, 32) and not torch.equal(
        one["classifier.weight"], other["classifier.weight"]
    )
    broken = {k: v for k, v in base.items() if "layer.1.ffn" not in k}
    save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="would be random"):
        untrained(source, ["clean", "toxic"], seed=1)
