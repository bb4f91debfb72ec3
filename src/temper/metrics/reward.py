"""How much a reward model makes of a prompt with its answer, and how much another one does.

A policy that learns from one reward model can learn that model's faults; a second one, trained on other data, does not
share them (Gao et al. 2023, "Scaling laws for reward model overoptimization").
"""

from __future__ import annotations

import numpy as np

from temper.metrics.table import register
from temper.types import Outputs, Scores


@register("reward", reads="reward", gives=lambda **options: ["reward_mean"], also=("second_reward_mean",))
def reward(outputs: Outputs) -> dict[str, Scores]:
    """Mean reward of prompt and answer as one text, by the evaluation's reward model; and by a second one, if named.

    Rewards have no unit: those of two reward models cannot be compared, and the signature says whose they are.

    >>> out = reward(Outputs([""] * 2, [""] * 2, [""] * 2, [True] * 2, rewards=np.array([1.0, 4.0]), reward_models=("rm",)))
    >>> {name: s.value for name, s in out.items()}
    {'reward_mean': 2.5}
    """
    found = {"reward_mean": outputs.rewards, "second_reward_mean": outputs.second_rewards}
    if outputs.rewards is None:
        raise ValueError("reward needs outputs.rewards")
    names = [*outputs.reward_models, "unnamed", "unnamed"]
    return {
        name: Scores.mean(np.asarray(rows), f"{name}|by:{by}")
        for (name, rows), by in zip(found.items(), names, strict=False)
        if rows is not None
    }
