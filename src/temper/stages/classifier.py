"""classifier: a model that tells labels of texts, trained from labelled rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.stats import rankdata

from temper.engine import device as devices
from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.engine.settings import Validated
from temper.errors import DataError, ModelError
from temper.hub import Source
from temper.job import Job
from temper.losses import nll
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.models.classify import Classifier, untrained
from temper.recipe import DataRef, ModelRef, Stage, detail, stages
from temper.stages.beforehand import summarise
from temper.stages.training import note_used, proven_merge, read_split
from temper.trees import Tree, chain, rows_of
from temper.types import Record

SPLITS = ("train", "validation", "test")
CHECKED = 16  # texts on which the saved classifier is compared with the one that was trained


@stages.register("classifier")
class TrainClassifier(Stage, Validated):
    """Train a classifier of texts on the columns `text` and `label` of a data stage; an adapter is folded in."""

    kind = "classifier"
    version = 2
    gives = "classifier"
    together = True
    trains_on = ("train",)

    model: ModelRef = detail(
        "base", "What it starts from, encoder or decoder: a stage, base, a folder, or a hub id (id@revision)."
    )
    data: DataRef = detail(..., "A data stage whose rows have the columns «text» and «label».")
    adapter: Adapter | None = detail(None, "Train an adapter and the head instead of the whole model.")
    attention: load.Attention = detail("auto", "auto, sdpa, eager or flash_attention_2.")
    row_tokens: int = detail(
        16, "Texts stand on padded lines, like lengths together; several that fit this count as one.", ge=16
    )
    lr: float = detail(5e-4, "Peak learning rate.", gt=0)

    def run(self, job: Job) -> None:
        records = {split: labelled(job, self.data, split) for split in SPLITS}
        labels = labels_of(records)
        device = devices.of(job.recipe)
        precision = devices.precision(self.precision, device)
        classifier = self._open(job, labels, device, precision)
        trees = {split: examples(classifier, rows, labels) for split, rows in records.items()}
        batches = Batches(
            trees["train"], self.batch_size * self.accumulation, self.row_tokens, self.micro_tokens, job.seed
        )
        validation = rows_of(trees["validation"], self.row_tokens, self.micro_tokens)
        loop = Loop(job, classifier, nll, batches, self, precision, validation)
        job.counts["examples"] = len(trees["train"])
        counts = Counter(label for _, label, _ in records["train"])
        lines = [
            f"rows: {len(records['train']):,} to train on, {len(records['validation']):,} for validation",
            "labels: " + ", ".join(f"{name} {counts[name]:,}" for name in labels),
        ]
        text, label, _ = records["train"][0]
        summarise(job, loop, lines, trees["train"], f"{text[:600]} ⟦{label}⟧")
        self._warn_of_cut(job, classifier, records["train"])
        loop.run()
        job.peak_device_memory = devices.peak_memory(device)
        if isinstance(classifier.hf, PeftModel):  # afterwards classifier.hf is a plain model, with its head
            proven_merge(job, classifier, batches.rows(0)[0])
        self._measure(job, classifier, records, precision)
        load.save(classifier.inner, classifier.lines.tokenizer, job.dir / "model")
        _check_saved(job, classifier, [t for t, *_ in records["train"][:CHECKED]], self.attention)

    def _open(self, job: Job, labels: Sequence[str], device: torch.device, precision: str) -> Classifier:
        """The base with a fresh head, the adapter on it."""
        source, trust = job.model(self.model), job.recipe.trust_remote_code
        tokenizer = load.tokenizer(source, trust_remote_code=trust)
        hf, notices = untrained(source, labels, seed=job.seed, attention=self.attention, trust_remote_code=trust)
        for notice in notices:
            job.warn(notice)
        hf.to(device)
        if self.adapter is not None:
            hf = adapters.attach(hf, self.adapter, job.seed, task="SEQ_CLS")
        if self.activation_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with devices.autocast(device, precision):
            classifier = Classifier(hf, tokenizer)
        for notice in classifier.notices:
            job.warn(notice)
        note_used(job, classifier, precision, classifier.proof)
        return classifier

    def _warn_of_cut(self, job: Job, classifier: Classifier, rows: Sequence[Labelled]) -> None:
        limit = classifier.lines.context
        long = sum(len(ids) > limit for ids in classifier.lines.encode([text for text, *_ in rows]))
        if long:
            job.warn(
                f"{long} of {len(rows)} texts are longer than the model's context ({limit} tokens); it is trained on "
                "their beginnings"
            )

    def _measure(self, job: Job, classifier: Classifier, records: dict[str, list[Labelled]], precision: str) -> None:
        """Accuracy, and the area under the curve of two labels, on rows that were not trained on."""
        held = {split: records[split] for split in SPLITS[1:] if records[split]}
        if not held:
            job.warn("there are no validation or test rows, so nothing is known of how well the classifier does")
        for split, rows in held.items():
            with devices.autocast(classifier.device, precision):
                found = classifier.probabilities([text for text, *_ in rows])
            right = np.array([classifier.labels.index(label) for _, label, _ in rows])
            accuracy = float((found.argmax(1) == right).mean())
            commonest = np.bincount(right).max() / len(right)
            line = f"{split}: {accuracy:.1%} of {len(rows):,} labels right (always the commonest: {commonest:.1%})"
            job.facts[f"{split} accuracy"] = round(accuracy, 4)
            if found.shape[1] == 2 and 0 < right.sum() < len(right):
                area = area_under_curve(found[:, 1], right == 1)
                job.facts[f"{split} area under the curve"] = round(area, 4)
                line += f", area under the curve {area:.3f}"
            job.summary += f"\n{line}"
            job.say(line)
            if split == "test" and accuracy <= commonest:
                job.warn(
                    f"on the test rows the classifier is right no more often than its commonest label ({accuracy:.1%})"
                )


Labelled = tuple[str, str, str]  # (text, label, where it came from)


def labelled(job: Job, ref: str, split: str) -> list[Labelled]:
    """Texts and labels of a split of a data stage; only the training split must have rows.

    Raises:
        DataError: a column is missing, or a label is empty.
    """
    records = read_split(job, ref.partition(".")[0], split, optional=split != "train")
    return [_labelled(record, ref) for record in records]


def _labelled(record: Record, ref: str) -> Labelled:
    row: dict[str, Any] = record.row
    if missing := [name for name in ("text", "label") if name not in row]:
        raise DataError(
            f"a classifier reads the columns «text» and «label»; {ref} has {', '.join(row)}",
            where=record.where,
            do=f'map it in the data stage: {missing[0]}: "{{column}}"',
        )
    label = "" if row["label"] is None else str(row["label"]).strip()
    if not label:
        raise DataError("a row has no label", where=record.where, do="drop such rows from the source, or label them")
    return row["text"], label, record.where


def labels_of(records: dict[str, list[Labelled]]) -> list[str]:
    """The labels of the training rows, sorted.

    Raises:
        DataError: fewer than two; one that a single row has; one that stands in another split alone.
    """
    counts = Counter(label for _, label, _ in records["train"])
    if len(counts) < 2:
        raise DataError(
            f"all {len(records['train'])} training rows have the label «{next(iter(counts))}»",
            do="a classifier needs at least two labels: check the column that «label» is made of",
        )
    for split, rows in records.items():
        for _, label, where in rows:
            if label not in counts:
                raise DataError(f"the label «{label}» stands in {split} and not in train", where=where, do="check it")
            if counts[label] == 1:
                raise DataError(
                    f"the label «{label}» has a single training row: nothing can be learnt of it",
                    where=where,
                    do="is it misspelt? the labels are " + ", ".join(sorted(counts)[:20]),
                )
    return sorted(counts)


def examples(classifier: Classifier, rows: Sequence[Labelled], labels: Sequence[str]) -> list[Tree]:
    """Each text as a chain of its tokens, within the context, and its label's number at the end, which alone is scored."""
    windows = [classifier.lines.windows(ids)[0] for ids in classifier.lines.encode([text for text, *_ in rows])]
    number = {label: k for k, label in enumerate(labels)}
    return [
        chain([*ids, number[label]], [0.0] * len(ids) + [1.0], where)
        for ids, (_, label, where) in zip(windows, rows, strict=True)
    ]


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of (positive, negative) pairs that the scores put in the right order; ties count half.

    >>> area_under_curve(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    n = int(positive.sum())
    ranks = rankdata(scores)[positive]  # Mann and Whitney 1947
    return float((ranks.sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def _check_saved(job: Job, classifier: Classifier, texts: Sequence[str], attention: load.Attention) -> None:
    """Make sure that what was saved is what was trained, its head included.

    Raises:
        ModelError: it scores otherwise.
    """
    saved = Classifier.open(
        Source(str(job.dir / "model")), device=classifier.device, attention=attention,
        trust_remote_code=job.recipe.trust_remote_code,
    )  # fmt: skip
    difference = float(np.abs(saved.probabilities(texts) - classifier.probabilities(texts)).max())
    if difference > 1e-4:
        raise ModelError(
            f"the saved classifier's probabilities differ from the trained one's by up to {difference:.2g}"
        )
    job.facts["saved"] = f"opened again, its probabilities equal the trained one's to {difference:.1e}"
