"""The classifier that a stage asks for the toxicity of texts, opened at the first question."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from temper import hub
from temper.engine import device as devices
from temper.errors import RecipeError
from temper.job import Job
from temper.models.classify import Classifier
from temper.rollouts.decoding import Decoding


class Judge:
    """Texts → their probabilities of `label`, float64 [N].

    Args:
        ref: the classifier as the recipe names it.
    """

    def __init__(self, job: Job, ref: str, label: str = "toxic") -> None:
        self.job, self.ref, self.label = job, ref, label

    @functools.cached_property
    def classifier(self) -> Classifier:
        """Opened, and what is odd about it told.

        Raises:
            ModelError: it is no classifier, or has no such label.
        """
        device, trust = (
            devices.setup(self.job.recipe.device, self.job.recipe.threads),
            self.job.recipe.trust_remote_code,
        )
        opened = Classifier.open(self.job.model(self.ref), device=device, trust_remote_code=trust)
        for notice in (*opened.notices, opened.find(self.label)[1]):
            if notice:
                self.job.warn(notice)
        return opened

    @functools.cached_property
    def name(self) -> str:
        """Which classifier it is, wherever it lies: a hub id at a commit, or a hash of its content."""
        source = self.job.model(self.ref)
        return f"{source.name}@{source.revision[:12]}" if source.revision else hub.identity(source)[:12]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = self.classifier.probability(texts, self.label)
        if self.classifier.windowed:
            self.job.warn(
                f"some texts are longer than the context of {self.ref} ({self.classifier.lines.context} tokens); "
                "they are scored in windows, and the highest counts"
            )
        return found


def check(*, asked: bool, classifier: str | None, samples: int, decoding: Decoding) -> None:
    """What an evaluation asks for fits together.

    Args:
        asked: whether a metric reads toxicity.

    Raises:
        RecipeError: it does not.
    """
    if asked and classifier is None:
        raise RecipeError(
            "the metric «toxicity» asks a classifier, and none is named",
            do="classifier: a stage of kind classifier, a folder, or a hub id",
        )
    if classifier is not None and not asked:
        raise RecipeError(
            f"classifier: {classifier} is named, and no metric asks it",
            do="add toxicity to metrics, or leave classifier out",
        )
    if samples > 1 and not asked:
        raise RecipeError(
            f"samples: {samples}, and only the metric «toxicity» reads more than one answer",
            do="add toxicity to metrics, or leave samples out",
        )
    if samples > 1 and decoding.temperature == 0:
        raise RecipeError(
            f"samples: {samples} at temperature 0 are {samples} times the same answer",
            do="decoding: {temperature: 1.0}, or leave samples out",
        )
