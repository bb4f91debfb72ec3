"""BLEU and chrF by sacrebleu: counts of shared n-grams, summed over all rows before anything is divided.

Papineni et al. 2002 ("BLEU: a method for automatic evaluation of machine translation"); Popović 2015 ("chrF: character
n-gram F-score for automatic MT evaluation"); Post 2018 ("A call for clarity in reporting BLEU scores"). A row's counts
are sacrebleu's own, its signature too. From sums to a score the formulas are written again here, because a bootstrap
asks for ten thousand scores at once; on the rows themselves they give what sacrebleu gives. One reference a row.

Both are in 0…100, as sacrebleu has them; ROUGE and METEOR are in 0…1. Neither is the mean of its rows, so that runs,
which keep rows only, are not compared by them.

Legend: N rows; D numbers of a row; O orders of n-grams.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from temper.metrics.table import register
from temper.metrics.words import require_words
from temper.types import Outputs, Scores

Tokenizer = Literal[
    "13a", "intl", "zh", "char", "none"
]  # those of sacrebleu's that need neither network nor dictionary
WordOrder = Annotated[int, Field(ge=0, le=4)]
ORDER = 4  # longest n-grams of BLEU
BETA = 2  # recall weighs β² times as much as precision in chrF


@register("bleu")
def bleu(outputs: Outputs, *, tokenize: Tokenizer = "13a", lowercase: bool = False) -> dict[str, Scores]:
    """Corpus BLEU by sacrebleu, 0 to 100: runs of 1 to 4 tokens shared with the reference, and a brevity penalty.

    Orders without any match are smoothed (`exp`, sacrebleu's default); where no reference has four tokens it is 0 whatever is
    answered, which its notice says. A single row is shown with its sentence BLEU,
    of the orders that it is long enough for.

    Args:
        tokenize: 13a is what published numbers are measured with, in any language. It knows the punctuation of ASCII
            alone: «слово» with its quotes is another word than слово. intl splits all punctuation of Unicode, and hyphens
            and apostrophes within words too. zh and char are for scripts written without spaces.
        lowercase: compare without case.

    Raises:
        DataError: no reference has a word.

    5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples: 100 · (5/6 · 3/5 · 2/4 · 1/3)^¼

    >>> out = Outputs([""], ["the cat sat on a mat"], ["the cat sat on the mat"], [True])
    >>> round(bleu(out)["bleu"].value, 6) == round(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, 6)
    True
    """
    from sacrebleu.metrics.bleu import BLEU  # with its list of data sets a third of a second

    require_words(outputs.references, "BLEU")
    scorer = BLEU(tokenize=tokenize, lowercase=lowercase, force=True)  # force: no warning of texts that look tokenized
    stats = _counts(scorer, outputs)
    rows = bleu_of(stats, effective=True)
    best = bleu_of(_counts(scorer, dataclasses.replace(outputs, predictions=outputs.references)).sum(0))
    notice = None
    if best == 0:
        notice = (
            f"BLEU counts runs of up to {ORDER} words, and no reference has so many: right answers score 0 too; exact_match, "
            "token_f1 and chrf measure such short ones"
        )
    return {"bleu": Scores(stats, rows, f"bleu|{scorer.get_signature()}", True, bleu_of, notice=notice)}


@register("chrf")
def chrf(
    outputs: Outputs,
    *,
    char_order: Annotated[int, Field(ge=1, le=10)] = 6,
    word_order: WordOrder = 0,
    lowercase: bool = False,
) -> dict[str, Scores]:
    """Corpus chrF by sacrebleu, 0 to 100: runs of 1 to 6 characters shared with the reference, recall before precision.

    Needs no words, so that it asks nothing of a language and forgives another case's ending.

    Args:
        char_order: longest run of characters.
        word_order: longest run of words counted too; 2 is chrF++.
        lowercase: compare without case.

    Raises:
        DataError: no reference has a word.

    Characters: 2 of 3 both ways; pairs: 1 of 2; triples: 0 of 1. Precision and recall are (2/3 + 1/2 + 0) / 3 = 7/18.

    >>> round(chrf(Outputs([""], ["кит"], ["киї"], [True]))["chrf"].value, 6) == round(100 * 7 / 18, 6)
    True
    """
    from sacrebleu.metrics.chrf import CHRF

    require_words(outputs.references, "chrF")
    scorer = CHRF(char_order=char_order, word_order=word_order, beta=BETA, lowercase=lowercase)
    stats = _counts(scorer, outputs)
    return {"chrf": Scores(stats, chrf_of(stats), f"chrf|{scorer.get_signature()}", True, chrf_of)}


def _counts(scorer: Any, outputs: Outputs) -> np.ndarray:
    """[N, D] as sacrebleu counts them; the method that its own significance tests call has no public name."""
    found = scorer._extract_corpus_statistics(outputs.predictions, [outputs.references])
    return np.array(found, dtype=np.float64)


def bleu_of(sums: np.ndarray, *, effective: bool = False) -> np.ndarray:
    """Sums [..., 10] of (length, reference's length, matches of 4 orders, n-grams of 4 orders) → BLEU [...], 0…100.

    Args:
        effective: leave out the orders for which a text is too short, as sentence BLEU does; else it scores 0.
    """
    length, reference = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    there = total > 0
    # The k-th order without a match counts as 1 / 2^k of one (Chen and Cherry 2014, smoothing 3).
    missed = np.cumsum(there & (matched == 0), axis=-1)
    counted = np.where(matched > 0, matched, 0.5**missed)
    logs = np.where(there, np.log(np.where(there, counted / np.where(there, total, 1), 1)), 0)
    orders = np.maximum(there.sum(-1), 1) if effective else ORDER
    brevity = np.minimum(0.0, 1 - reference / np.maximum(length, 1))  # a text of no length has no match either
    score = 100 * np.exp(brevity + logs.sum(-1) / orders)
    scored = (matched > 0).any(-1) & (effective | there.all(-1))
    return np.where(scored, score, 0.0)


def chrf_of(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 3 · O] of (n-grams, the reference's, shared) for each order → chrF [...], 0…100.

    Precision and recall are averaged over the orders that both texts have, then combined.
    """
    own, reference, shared = (sums[..., k::3] for k in range(3))  # [..., O]
    both = (own > 0) & (reference > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision = (shared / np.where(both, own, np.inf)).sum(-1) / orders
    recall = (shared / np.where(both, reference, np.inf)).sum(-1) / orders
    below = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / np.where(below > 0, below, 1)
