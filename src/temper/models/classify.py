"""Texts → probabilities of labels, by any sequence-classification model: an encoder, or a decoder with a head.

Legend: N texts, W lines (a line is a text, or one window of a text longer than the context), L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from temper.errors import ModelError
from temper.hub import Source
from temper.models import load
from temper.models.scores import Policy, padded_precision
from temper.trees import Row

WIDTHS = 8  # widths are rounded up to this: few shapes, so a CPU's matrix libraries keep few kernels
NO_LIMIT = 10**9  # tokens
NEGATIONS = ("non", "not", "no", "neutral", "un")  # «not_toxic» holds «toxic» and means the opposite


class Lines:
    """Texts as lines of token ids, within the context and with the tokens that the tokenizer puts around a text."""

    def __init__(self, tokenizer: Any, hf: Any) -> None:
        self.tokenizer = tokenizer
        whole = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        at = next(k for k in range(len(whole) + 1) if whole[k : k + len(bare)] == bare)
        self.head, self.tail = list(whole[:at]), list(whole[at + len(bare) :])
        self.context = _context(tokenizer, hf)
        self.pad = self._padding(hf)

    def _padding(self, hf: Any) -> int:
        """The id that fills lines up, set in the model and the tokenizer alike.

        A decoder's head reads the last token that is not the padding token, so where a model has none, the token that
        ends every text cannot be it.
        """
        config, tok = hf.config.get_text_config(), self.tokenizer
        if config.pad_token_id is None:
            ids = (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id, tok.bos_token_id, 0)
            config.pad_token_id = next(i for i in ids if i is not None and [i] != self.tail[-1:])
        hf.config.pad_token_id = config.pad_token_id
        if tok.pad_token_id != config.pad_token_id:
            tok.pad_token = tok.convert_ids_to_tokens(config.pad_token_id)
        return config.pad_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, however long. A text without tokens is one padding token."""
        found = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        return [list(ids) or [self.pad] for ids in found]

    def windows(self, ids: list[int]) -> list[list[int]]:
        """A text's lines: itself, or windows that overlap by half, so that nothing short is cut in two in both."""
        if len(ids) <= self.context:
            return [ids]
        body = ids[len(self.head) : len(ids) - len(self.tail)]
        room = self.context - len(self.head) - len(self.tail)
        step = max(1, room // 2)
        starts = range(0, max(1, len(body) - room + step), step)
        return [self.head + body[k : k + room] + self.tail for k in starts]


class Classifier(Policy):
    """A sequence-classification model, as a policy over labels: the loop trains it as it trains any other.

    Args:
        hf: a transformers model for sequence classification, or a PEFT model around one.
        tokenizer: its tokenizer; both are given a padding token where they have none.

    Attributes:
        notices: what is worth telling of the model that was opened.
        windowed: texts scored in windows so far, since they are longer than the context.
    """

    def __init__(self, hf: Any, tokenizer: Any, notices: Sequence[str] = ()) -> None:
        super().__init__(hf, "padded")
        self.lines = Lines(tokenizer, self.inner)
        self.notices = list(notices)
        self.windowed = 0
        self.together = True  # lines of different length may be padded and scored together
        self.proof = self._prove()

    @staticmethod
    def open(
        source: Source,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: load.Attention = "auto",
        trust_remote_code: bool = False,
    ) -> Classifier:
        """A classifier from a folder or the hub, in evaluation mode.

        Raises:
            ModelError: it cannot be read; it lacks weights (a language model has no such head); it gives a number
                instead of probabilities; it is an adapter.
        """
        if source.adapters:
            raise ModelError(
                f"{source.adapters[-1]} is an adapter, and a classifier is opened whole",
                do="fold it into its base, with its head, and name the folder of the whole model",
            )
        config = load.configuration(source, trust_remote_code=trust_remote_code)
        if config.problem_type == "regression":
            raise ModelError(f"{source.name} gives a number and no probability", do="name a model that tells labels")
        hf, info, notices = load.weights(
            AutoModelForSequenceClassification, source, config, dtype=dtype, attention=attention,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{source.name} is no classifier: it lacks {', '.join(missing[:3])}, which would be random",
                do="name a sequence-classification model, or train one with a stage of kind classifier",
            )
        if info["unexpected_keys"]:
            notices.append(f"{len(info['unexpected_keys'])} weights of {source.name} belong to no part of a classifier")
        tokenizer = load.tokenizer(source, trust_remote_code=trust_remote_code)
        return Classifier(hf.to(device).eval(), tokenizer, notices)

    @property
    def labels(self) -> list[str]:
        """Names of the labels in the order of the head's outputs."""
        return labels_of(self.inner.config)

    def find(self, label: str, *, key: str = "label: …") -> tuple[int, str]:
        """The label's index, and a sentence where it goes by another name ("" where not).

        Found regardless of case; else the one label that holds the name and does not negate it is taken.

        Args:
            key: where the recipe says which label it is, for the error.

        Raises:
            ModelError: there is no such label, or more than one; it lists those there are.
        """
        return find(self.labels, label, where=str(self.inner.config.name_or_path), key=key)

    def probability(self, texts: Sequence[str], label: str = "toxic", *, batch_tokens: int = 8192) -> np.ndarray:
        """Probability of a label, float64 [N]; independent of batch and order up to rounding. Dropout is off.

        A text longer than the context is scored in windows that overlap by half, and the highest is its own.

        Args:
            batch_tokens: tokens of one forward pass, padding included.

        Raises:
            ModelError: no such label.
        """
        index, _ = self.find(label)
        return self.probabilities(texts, batch_tokens=batch_tokens)[:, index]

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], *, batch_tokens: int = 8192) -> np.ndarray:
        """Of every label, float64 [N, L]: they add up to 1, but for models of several labels a text, and long texts."""
        windows = [self.lines.windows(ids) for ids in self.lines.encode(texts)]
        if not windows:
            return np.zeros((0, len(self.labels)))
        self.windowed += sum(len(w) > 1 for w in windows)
        lines = [line for w in windows for line in w]
        out = np.zeros((len(lines), len(self.labels)))
        was_training = self.training
        self.eval()
        try:
            for taken in batched(lines, batch_tokens):
                out[taken] = self._shares(self.logits([lines[i] for i in taken])).cpu().numpy()
        finally:
            self.train(was_training)
        return np.maximum.reduceat(out, np.cumsum([0, *(len(w) for w in windows[:-1])]), axis=0)

    def _shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [W, L] → probabilities, float64 [W, L]."""
        several = self.inner.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        return logits.double().sigmoid() if several else logits.double().softmax(-1)

    def forward(self, row: Row) -> torch.Tensor:
        """Log-probability of each example's label, float32 [S]: an example is a text's tokens and then its label's number."""
        texts = [tree.ids[:-1].tolist() for tree in row.trees]
        return -functional.cross_entropy(self.logits(texts).float(), row.ids.index_select(0, row.tgt), reduction="none")

    def logits(self, lines: Sequence[Sequence[int]]) -> torch.Tensor:
        """[W, L] in the model's own precision; lines are padded on the right."""
        if not self.together and len(lines) > 1:
            return torch.cat([self.logits([line]) for line in lines])
        width = max(len(line) for line in lines)
        if len(lines) > 1:
            width = max(width, min(-(-width // WIDTHS) * WIDTHS, self.lines.context))
        ids = torch.full((len(lines), width), self.lines.pad)
        mask = torch.zeros_like(ids)
        for k, line in enumerate(lines):
            ids[k, : len(line)] = torch.tensor(line)
            mask[k, : len(line)] = 1
        return self.hf(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits

    @torch.no_grad()
    def _prove(self) -> str:
        """Whether a short text beside a long one scores as it does alone; where not, each is scored alone.

        Some models take their summary from the last place (XLNet) or count places by themselves. What padding may
        change is measured against how far the two texts are apart.
        """
        lines = [ids[: self.lines.context] for ids in self.lines.encode(["0 1 2 3 4 5 6 7 8 9 А Б В a b c", "а б"])]
        was_training = self.training
        self.eval()
        try:
            alone = torch.cat([self.logits([line]) for line in lines]).double()
            difference = (self.logits(lines).double() - alone).abs().max().item()
        finally:
            self.train(was_training)
        apart = (alone[0] - alone[1]).abs().max().item()
        self.together = difference <= (0.02 if padded_precision(self) == torch.float32 else 0.2) * apart
        if self.together:
            return f"texts padded together score as they do alone (largest difference {difference:.1e})"
        self.notices.append(
            f"with this model a text scores differently when it is padded (by {difference:.2g} where two texts differ by "
            f"{apart:.2g}), so each text is scored alone, slower"
        )
        return "each text is scored alone: padding changes this model's scores"


def labels_of(config: Any) -> list[str]:
    """Names of the labels that a model's configuration has, in the order of the head's outputs."""
    return [str(config.id2label[k]) for k in range(len(config.id2label))]


def find(labels: Sequence[str], label: str, *, where: str = "", key: str = "label: …") -> tuple[int, str]:
    """A label's place among `labels`, and a sentence where it goes by another name (see `Classifier.find`).

    Args:
        where: which classifier it is, for the error.
        key: where the recipe says which label it is.

    Raises:
        ModelError: there is no such label, or more than one; it lists those there are.
    """
    names, wanted = [name.casefold() for name in labels], label.casefold()
    if wanted in names:
        return names.index(wanted), ""
    close = [k for k, name in enumerate(names) if wanted in name and not _negates(name, wanted)]
    if len(close) != 1:
        raise ModelError(
            f"the classifier has no label «{label}»; its labels are {', '.join(labels)}",
            where=where,
            do=f"write {key} with the one of these that means «{label}»",
        )
    return close[0], f"the classifier's label «{labels[close[0]]}» is taken for «{label}»"


def untrained(
    source: Source,
    labels: Sequence[str],
    *,
    seed: int,
    attention: load.Attention = "auto",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, list[str]]:
    """A model with a fresh head for `labels`, a function of the seed, and notices. Everything but the head is there.

    Raises:
        ModelError: other weights than the head's are missing; the base is an unmerged adapter.
    """
    if source.adapters:
        raise ModelError(
            f"{source.adapters[-1]} is an adapter, and a classifier is trained on a whole model", do="merge it first"
        )
    config = load.configuration(source, trust_remote_code=trust_remote_code)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: k for k, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    torch.manual_seed(seed)
    hf, info, notices = load.weights(
        AutoModelForSequenceClassification, source, config, dtype=dtype, attention=attention,
        trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True,  # the head of a classifier of other labels
    )  # fmt: skip
    body = f"{hf.base_model_prefix}."
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    # a pooler between body and head is as untrained as the head in models that never used one (RoBERTa)
    if wrong := [key for key in fresh if key.startswith(body) and ".pooler." not in key]:
        raise ModelError(
            f"{source.name} lacks {len(wrong)} of the model's weights ({', '.join(wrong[:3])}, …); they would be random",
            do="is the download complete?",
        )
    return hf, notices


def _negates(name: str, wanted: str) -> bool:
    """Whether a label's name turns the word it holds into its opposite: «non-toxic», «not_toxic», «neutral/toxic»."""
    return any(sign in name.replace(wanted, " ") for sign in NEGATIONS)


def batched(lines: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of lines of like length, so many together as fit `batch_tokens` with their padding."""
    out: list[list[int]] = []
    for i in sorted(range(len(lines)), key=lambda i: (-len(lines[i]), i)):
        if not out or (len(out[-1]) + 1) * len(lines[out[-1][0]]) > batch_tokens:
            out.append([])
        out[-1].append(i)
    return out


def _context(tokenizer: Any, hf: Any) -> int:
    """The longest line in tokens. RoBERTa and its kin count places from the padding token's id, which takes room."""
    tables = (m for name, m in hf.named_modules() if name.endswith("position_embeddings"))
    lost = next((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), 0)
    places = load.context(hf) or 0  # XLNet says −1: there is no limit
    return min(tokenizer.model_max_length, places - lost if places > 0 else NO_LIMIT, NO_LIMIT)
