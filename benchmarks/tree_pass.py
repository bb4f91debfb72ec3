"""The tree pass alone: forward and backward over rows of 1,600 tokens, all weights trained, no optimiser and no data.

Rows are a prompt of 600 tokens with eight answers of 125, as a rollout gives them («groups»), or texts of log-normal
lengths averaging 180 tokens, packed («texts»); answers, and whole texts, are scored. Against transformers' own padded
pass: the same sequences, each branch a line of its own, sixteen lines a batch, its loss the sum of cross-entropies.

What is asked is a share of the machine's peak in products of matrices, on useful tokens: 60 % in float32, 35 % in bf16.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest, Settings, Side
from shapes import FIRST, VOCABULARY, lognormal, operations

WIDTH, ROWS = 1600, 2
PROMPT, ANSWER, ANSWERS = 600, 125, 8
LINES = 16
Sequences = list[tuple[list[int], list[list[int]]]]  # what is shared and not scored, and what follows it


def work(kind: str) -> Sequences:
    if kind == "groups":
        draw = np.random.default_rng(0)
        return [
            (draw.integers(FIRST, VOCABULARY, PROMPT).tolist(), draw.integers(FIRST, VOCABULARY, (ANSWERS, ANSWER)).tolist())
            for _ in range(ROWS)
        ]  # fmt: skip
    texts = [p + a for p, a in lognormal(64)]
    kept: list[list[int]] = []
    while texts and sum(map(len, kept)) < WIDTH * ROWS:
        kept.append(texts.pop()[: WIDTH * ROWS - sum(map(len, kept))])
    return [([], [text]) for text in kept]


def made(which: str, folder: Path, settings: Settings) -> Side:
    del folder  # nothing is written
    kind = Trees if which == "temper" else Padded
    return kind(work(settings["work"]), half=settings["precision"] == "bf16")


def loaded() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(os.environ["TEMPER_BENCH_BASE"], dtype=torch.float32).train()


class Trees:
    """`Policy` on rows as the stages pack them."""

    def __init__(self, sequences: Sequences, *, half: bool) -> None:
        from temper.engine import device
        from temper.models.proof import prove
        from temper.models.scores import Policy
        from temper.trees import chain, group, rows_of

        device.setup("cpu", torch.get_num_threads(), halves=half)
        self.policy, self.half = Policy(loaded()), half
        assert prove(self.policy)["layout"] == "tree"
        self.policy.train()
        trees = [group(shared, own) if shared else chain(own[0], [1.0] * len(own[0])) for shared, own in sequences]
        self.rows = rows_of(trees, WIDTH, WIDTH)
        self.tokens = sum(row.tokens for row in self.rows)
        scored = sum(len(row.tgt) for row in self.rows)
        seen = sum(
            len(shared) ** 2 / 2 + sum(len(x) * (len(shared) + len(x) / 2) for x in own) for shared, own in sequences
        )
        self.flops = operations(self.tokens, scored, seen, full=True)

    def epoch(self) -> None:
        self.loss()

    def loss(self) -> float:
        """Mean over all scored tokens."""
        from temper.models.products import added_in_place

        total, scored = 0.0, 0
        for row in self.rows:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                found = -self.policy(row).sum()
            with added_in_place():  # as the loop has it
                found.backward()
            total, scored = total + float(found.detach()), scored + len(row.tgt)
        self.policy.zero_grad(set_to_none=True)
        return total / scored


class Padded:
    """transformers, padded on the right."""

    tokens, flops = 0, 0.0

    def __init__(self, sequences: Sequences, *, half: bool) -> None:
        self.model, self.half = loaded(), half
        lines = [(shared + x, len(shared)) for shared, own in sequences for x in own]
        self.batches = [self._batch(lines[k : k + LINES]) for k in range(0, len(lines), LINES)]

    @staticmethod
    def _batch(lines: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        width = max(len(ids) for ids, _ in lines)
        ids, mask, labels = (torch.full((len(lines), width), fill) for fill in (0, 0, -100))
        for k, (line, start) in enumerate(lines):
            ids[k, : len(line)] = torch.tensor(line)
            mask[k, : len(line)] = 1
            labels[k, start : len(line)] = ids[k, start : len(line)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def epoch(self) -> None:
        self.loss()

    def loss(self) -> float:
        total, scored = 0.0, 0
        for batch in self.batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                found = self.model(**batch, use_cache=False, num_items_in_batch=1).loss
            found.backward()
            total, scored = total + float(found.detach()), scored + int((batch["labels"][:, 1:] != -100).sum())
        self.model.zero_grad(set_to_none=True)
        return total / scored


CONTESTS = [
    Contest(
        f"tree_pass-{kind}-{precision}", "transformers padded", made, tool="transformers",
        ours={"work": kind, "precision": precision}, theirs={"work": kind, "precision": precision},
        share={"float32": 0.6, "bf16": 0.35}[precision],
    )
    for kind in ("groups", "texts")
    for precision in ("float32", "bf16")
]  # fmt: skip
