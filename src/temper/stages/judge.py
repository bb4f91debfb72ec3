"""The models that a stage asks about texts, opened at the first question: a classifier, a reward model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from temper import hub
from temper.engine import device as devices
from temper.errors import RecipeError
from temper.hub import Source
from temper.job import Job
from temper.models import load
from temper.models.classify import Classifier, find, labels_of
from temper.models.reward import RewardModel
from temper.rollouts.decoding import Decoding


class Judge:
    """Texts → their probabilities of `label`, float64 [N].

    Args:
        ref: the classifier as the recipe names it.
        key: where the recipe says which label is meant, for errors.
    """

    def __init__(self, job: Job, ref: str, label: str = "toxic", *, key: str = "toxic_label: …") -> None:
        self.job, self.ref, self.label, self.key = job, ref, label, key

    def checked(self) -> Judge:
        """Itself, once the label was found in the classifier's configuration: hours may pass before it is first asked.

        Raises:
            ModelError: it cannot be read, or has no such label.
        """
        config = load.configuration(self.job.model(self.ref), trust_remote_code=self.job.recipe.trust_remote_code)
        find(labels_of(config), self.label, where=self.ref, key=self.key)
        return self

    @functools.cached_property
    def classifier(self) -> Classifier:
        """Opened, and what is odd about it told.

        Raises:
            ModelError: it is no classifier, or has no such label.
        """
        device, trust = (
            devices.of(self.job.recipe),
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
        return _named(self.job.model(self.ref))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = self.classifier.probability(texts, self.label)
        if self.classifier.windowed:
            self.job.warn(
                f"some texts are longer than the context of {self.ref} ({self.classifier.lines.context} tokens); "
                "they are scored in windows, and the highest counts"
            )
        return found


class Rewarder:
    """Texts → their rewards, float64 [N].

    Args:
        ref: the reward model as the recipe names it: any sequence-classification model.
        label: the label whose logit is the reward, where it has several.
    """

    def __init__(self, job: Job, ref: str, label: str | None = None) -> None:
        self.job, self.ref, self.label = job, ref, label

    @functools.cached_property
    def model(self) -> RewardModel:
        """Opened, and what is odd about it told.

        Raises:
            ModelError: it is no such model, or its labels and `label` do not fit.
        """
        recipe = self.job.recipe
        device = devices.of(recipe)
        opened = RewardModel.open(
            self.job.model(self.ref), label=self.label, device=device, trust_remote_code=recipe.trust_remote_code
        )
        for notice in opened.notices:
            self.job.warn(notice)
        return opened

    @functools.cached_property
    def name(self) -> str:
        """Which model it is and which of its labels, wherever it lies."""
        return _named(self.job.model(self.ref)) + (f"#{self.label}" if self.label else "")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = self.model.scores(texts)
        if self.model.cut:
            self.job.warn(
                f"some texts are longer than the context of {self.ref} ({self.model.lines.context} tokens); their "
                "beginnings are scored"
            )
        return found


def _named(source: Source) -> str:
    return f"{source.name}@{source.revision[:12]}" if source.revision else hub.identity(source)[:12]


def check_reward_model(model: str | None, label: str | None, *, asked: bool, by: str) -> None:
    """What is asked of a reward model and what is named fit together.

    Args:
        asked: whether anything asks it.
        by: what would: «the reward «model»».

    Raises:
        RecipeError: they do not.
    """
    if asked and model is None:
        raise RecipeError(
            f"{by} asks a reward model, and none is named",
            where="reward_model",
            do="reward_model: a stage of kind reward, a folder, or a hub id",
        )
    if model is not None and not asked:
        raise RecipeError(
            f"reward_model: {model} is named, and nothing asks it",
            where="reward_model",
            do=f"ask for {by}, or leave reward_model out",
        )
    if label is not None and model is None:
        raise RecipeError(f"reward_label: {label} is a label of no model", where="reward_label", do="name reward_model")


def check(*, asked: bool, classifier: str | None, samples: int, decoding: Decoding) -> None:
    """What an evaluation asks for fits together.

    Args:
        asked: whether a metric asks a classifier.

    Raises:
        RecipeError: it does not.
    """
    if asked and classifier is None:
        raise RecipeError(
            "the metrics toxicity and style ask a classifier, and none is named",
            do="classifier: a stage of kind classifier, a folder, or a hub id",
        )
    if classifier is not None and not asked:
        raise RecipeError(
            f"classifier: {classifier} is named, and no metric asks it",
            do="add toxicity or style to metrics, or leave classifier out",
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
