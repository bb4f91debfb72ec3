"""How probable the model finds the references, and how far it is from another along its own answers.

Loss and perplexity count per token of the model's own tokenizer, so models with different tokenizers are not comparable by them.
"""

from __future__ import annotations

import numpy as np

from temper.metrics.table import register
from temper.types import Outputs, Scores


def _counted(outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Stats [N, 2] of (nats, tokens), and nats per token [N]."""
    if outputs.nll is None or outputs.tokens is None:
        raise ValueError("loss and perplexity need outputs.nll and outputs.tokens")
    stats = np.stack([outputs.nll, outputs.tokens], -1).astype(np.float64)
    return stats, nats_per_token(stats)


def nats_per_token(sums: np.ndarray) -> np.ndarray:
    """[..., 2] of (nats, tokens) → [...]; nan where there are no tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def exp_of_ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2] of (nats, tokens) → perplexity [...]; inf beyond what a float holds (about 709 nats a token)."""
    with np.errstate(over="ignore"):
        return np.exp(nats_per_token(sums))


@register("loss", reads="likelihood")
def loss(outputs: Outputs) -> dict[str, Scores]:
    """Negative log-likelihood of the references, in nats per token.

    All tokens weigh the same: it is the sum over all references divided by their tokens, not the mean of the rows.

    >>> out = Outputs(["", ""], ["", ""], ["", ""], [True, True], np.array([6.0, 2.0]), np.array([3, 1]))
    >>> loss(out)["loss"].value
    2.0
    """
    stats, rows = _counted(outputs)
    return {"loss": Scores(stats, rows, "loss|nats/token|of:reference", False, nats_per_token)}


@register("perplexity", reads="likelihood")
def perplexity(outputs: Outputs) -> dict[str, Scores]:
    """Perplexity of the references: exp of the loss in nats per token."""
    stats, rows = _counted(outputs)
    with np.errstate(over="ignore"):
        shown = np.exp(rows)
    return {"perplexity": Scores(stats, shown, "perplexity|per-token|of:reference", False, exp_of_ratio)}


@register("kl", reads="kl")
def kl(outputs: Outputs) -> dict[str, Scores]:
    """Divergence from the first model, KL(this ‖ first), in nats an answer.

    Exact at every token: Σ over the whole vocabulary, summed along the model's own answer. For sampled answers its mean
    is the KL of the two distributions over answers, with less noise than any estimate from the sampled tokens alone.

    >>> kl(Outputs(["", ""], ["", ""], ["", ""], [True, True], kl=np.array([1.0, 2.0])))["kl"].value
    1.5
    """
    if outputs.kl is None:
        raise ValueError("kl needs outputs.kl")
    return {"kl": Scores.mean(outputs.kl, f"kl|nats/answer|exact|from:{outputs.kl_to}", higher_is_better=None)}
