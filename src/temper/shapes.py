"""Sizes of models and data before they are loaded, and what arithmetic on them costs. Nothing here is run or written.

Legend: M parameters in matrix products, h hidden width, V vocabulary, L layers, w width of a row in tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from temper import hub
from temper.data import mini, sources
from temper.data.card import read_rows
from temper.data.formats import apply, texts
from temper.engine import device as devices
from temper.errors import ModelError
from temper.models import adapters, load, quantized
from temper.models.methods import Adapter
from temper.recipe import Recipe
from temper.runfolder import Result, read_json
from temper.stages import streaming
from temper.stages.data import Data
from temper.stages.pretrain import Pretrain, fresh
from temper.types import Row

CHARACTERS_PER_TOKEN = 3.5  # of byte-level BPE: 4 and more in English, 2 to 4.5 in Cyrillic
ASSUMED_TOKENS = 300  # of a row that cannot be looked at
LOOKED_AT = 200  # rows made or drawn to see how long they are


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model's arithmetic and memory depend on. `linear` are the (in, out) of its matrices but the head; `cached`: keys
    and values of one token in all layers, in numbers; `make` makes the model without its weights."""

    parameters: int
    linear: tuple[tuple[int, int], ...]
    hidden: int
    layers: int
    vocabulary: int
    cached: int
    make: Callable[[], Any] = dataclasses.field(compare=False, repr=False)

    @property
    def matrices(self) -> int:
        return sum(a * b for a, b in self.linear)

    def bytes(self, held: quantized.Held | None) -> float:
        """Memory of the weights in float32; of a base in few bits that of its matrices as they are held, scales included."""
        return 4.0 * (self.parameters - self.matrices) + quantized.BYTES[held] * self.matrices

    def adapter(self, adapter: Adapter) -> int:
        """Parameters of an adapter on this model.

        Raises:
            ModelError: the model cannot take it.
        """
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of weights that are not there
            hf = adapters.attach(self.make(), adapter.model_copy(update={"text": None}), seed=0)
        return sum(p.numel() for p in hf.parameters() if p.requires_grad)


class _Vocabulary:
    """Stands for a tokenizer that is not trained yet."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def size_of_pretrained(stage: Pretrain) -> Size:
    """Size of the model that a pretrain stage makes, none of its weights being filled in.

    >>> from temper.models.methods import Adapter
    >>> from temper.stages.pretrain import Shape
    >>> size = size_of_pretrained(Pretrain(data="x", shape=Shape(vocabulary=1200, hidden=64, layers=2, heads=2)))
    >>> size.parameters, size.adapter(Adapter(r=16)), size.adapter(Adapter(method="lora+prompt", r=16))
    (183616, 40960, 42240)
    """
    return _size(lambda: fresh(stage.shape, _Vocabulary(stage.shape.vocabulary), seed=0))


def size_of_source(source: hub.Source, *, trust_remote_code: bool = False) -> Size:
    """Size of a model in a folder or on the hub, from its configuration.

    Raises:
        OSError, ValueError: it has none that transformers knows.
    """
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # In float32, whatever type the weights are kept in: training holds them so, and `footprint` halves what it may.
    return _size(lambda: kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code))


def _size(make: Callable[[], Any]) -> Size:
    with torch.device("meta"):
        model = make()
    head = model.get_output_embeddings()
    linear = tuple(
        (m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )
    config = model.config.get_text_config()
    every = sum(p.numel() for p in model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width
    return Size(every, linear, config.hidden_size, config.num_hidden_layers, config.vocab_size, cached, make)


def training_flops(
    size: Size, *, scored: float, adapter: bool, head_trained: bool, width: float, recompute: bool
) -> float:
    """Floating-point operations a token of one forward and backward pass.

    A product with an (a, b) matrix takes 2ab forward, 2ab for the gradient of its input and, where it is trained, 2ab
    for its own. Attention: 4wh a layer forward, twice that backward.

    Args:
        scored: share of tokens at which the head runs.
        width: tokens that one token is compared with: the row's width, since the mask is dense.
        recompute: activations are computed again in the backward pass.
    """
    passes = (2 if adapter else 3) + recompute
    head = 2 * size.hidden * size.vocabulary * scored * (3 if head_trained else 2)
    return 2 * size.matrices * passes + head + 4 * width * size.hidden * size.layers * (3 + recompute)


@functools.cache
def matrix_rate(device: torch.device, precision: str, rows: int, hidden: int) -> float:
    """FLOP/s of (rows × hidden) by (hidden × 4 hidden) products here, measured in about a quarter of a second."""
    dtype = devices.DTYPES[precision]
    a = torch.ones(rows, hidden, device=device, dtype=dtype)
    b = torch.ones(hidden, 4 * hidden, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + 0.25
    while time.perf_counter() < until:
        began = time.perf_counter()
        for _ in range(8):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)  # the least disturbed
    return 8 * 2 * rows * hidden * 4 * hidden / best


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a data stage by split, and the median tokens of one: all of it, and its answer alone."""

    splits: dict[str, float]
    tokens: float
    answer: float
    basis: str

    def used(self, stage: Any) -> float:
        """Training rows of which a stage makes use."""
        n = min(self.splits.get("train", 0.0), getattr(stage, "take", None) or float("inf"))
        return n * float(getattr(stage, "share", 1.0))


Count = Callable[[str], int]  # the tokens of a text


def counter(source: hub.Source, *, trust_remote_code: bool = False) -> Count | None:
    """Counts tokens as a model does; None where its tokenizer is not on this machine."""
    try:
        tokenizer = load.tokenizer(source, trust_remote_code=trust_remote_code, here=True)
    except ModelError:  # what is wrong with it is told by the stage that needs it
        return None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _lengths(rows: Sequence[Row], count: Count | None) -> tuple[float, float, str]:
    """Median tokens of a row and of its answer, and how they were told."""
    mapped = [texts(row) for row in rows]
    answers = [m.get("completion", m.get("chosen", "".join(m.values()))) for m in mapped]
    if count is None:
        whole, part = (
            statistics.median(len(t) for t in each) / CHARACTERS_PER_TOKEN
            for each in (["".join(m.values()) for m in mapped], answers)
        )
        return whole, part, f"{len(mapped)} rows looked at, {CHARACTERS_PER_TOKEN} characters a token assumed"
    whole, part = (statistics.median(map(count, each)) for each in (["".join(m.values()) for m in mapped], answers))
    return whole, part, f"{len(mapped)} rows looked at, their tokens counted"


def rows_of_card(result: Result, count: Count | None = None) -> Rows:
    """Rows of a finished data stage; `count` is asked where its card has lengths in characters only."""
    card = read_json(result.path / "card.json")
    name, lengths = next(iter(card["lengths"].items()))
    unit = next(iter(lengths.values()))["unit"]
    file = result.path / "data" / f"{name}.parquet"
    if unit != "tokens" and file.is_file():  # of a stream's train there is none
        rows = [record.row for record in read_rows(file)[:LOOKED_AT]]
        tokens, answer, basis = _lengths(rows, count)
        return Rows(card["splits"], tokens, answer, f"{result.name}: {basis}")
    one = 1.0 if unit == "tokens" else CHARACTERS_PER_TOKEN
    medians = {column: found["median"] / one for column, found in lengths.items()}
    answer = medians.get("completion", medians.get("chosen", sum(medians.values())))
    return Rows(card["splits"], sum(medians.values()), answer, f"the rows of {result.name}")


def rows_of_source(stage: Data, recipe: Recipe, count: Count | None = None) -> Rows | None:
    """Rows that a data stage would make, from a look at its source; None where neither number nor length is known.

    Args:
        count: of tokens, by the model that would read them; None: a rule of thumb over characters.

    Raises:
        DataError, RecipeError: as reading the source would.
    """
    if stage.stream is not None:
        n, first = streaming.first_rows(stage, recipe.folder, LOOKED_AT)
        tokens, answer, basis = _lengths([r.row for r in first], count)
        return Rows(_splits(stage, n), tokens, answer, basis)
    made, most = stage.source.startswith(sources.MINI), (stage.best.rows if stage.best else None) or float("inf")
    if not made and sources.fingerprint(stage.source, recipe.folder, split=stage.split) is None:
        if stage.take is None:
            return None
        tokens = min(ASSUMED_TOKENS, stage.drop.longer_than or ASSUMED_TOKENS)
        return Rows(_splits(stage, min(stage.take, most)), tokens, tokens / 4, f"{tokens} tokens a row assumed")
    look = min(LOOKED_AT, stage.take or LOOKED_AT) if made else stage.take
    records = sources.read(
        stage.source, split=stage.split, encoding=stage.encoding, base=recipe.folder, rows=look, seed=recipe.seed
    ).records
    n = (stage.take or mini.ROWS[stage.split]) if made else len(records)
    templates = streaming.templates_of(stage)
    tokens, answer, basis = _lengths([r.row for r in apply(records[:LOOKED_AT], templates, keep=stage.keep)], count)
    return Rows(_splits(stage, min(n, most)), tokens, answer, basis)


def _splits(stage: Data, n: float) -> dict[str, float]:
    out = {}
    for name in ("validation", "test"):
        value = getattr(stage, name)
        if not isinstance(value, str):
            out[name] = min(n, value if isinstance(value, int) else value * n)
    return {"train": max(0.0, n - sum(out.values())), **out}
