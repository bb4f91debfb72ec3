"""Log-probabilities of ragged texts: prompt and answer, log-normal lengths averaging 180 tokens, the answers scored.

Temper's side is what `evaluate` does for its measures of likelihood. The other side is transformers without gradients and
padded on the right: as documented the model's logits everywhere, log-softmax in float32 where they are scored; tuned
sorted by length, and the head too asked only where something is scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from contest import Contest, Settings, Side
from shapes import lognormal, operations

TEXTS = 64
Text = tuple[list[int], list[int]]  # prompt, answer


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    texts = lognormal(asked.pop("rows", TEXTS))
    return Temper(texts, **asked) if which == "temper" else Padded(texts, **asked)


def loaded(which: Any) -> Any:
    """The model in float32, for inference."""
    import os

    return which.from_pretrained(os.environ["TEMPER_BENCH_BASE"], dtype=torch.float32).eval()


class Temper:
    """`likelihood` of the stage `evaluate`, on a proven model."""

    def __init__(self, texts: list[Text], *, precision: str, micro_tokens: int = 4096) -> None:
        from transformers import AutoModelForCausalLM

        from temper.data.chat import Encoded
        from temper.engine import device
        from temper.models.proof import prove
        from temper.models.scores import Policy

        device.setup("cpu", torch.get_num_threads(), halves=precision == "bf16")  # as every stage does
        self.policy, self.how = Policy(loaded(AutoModelForCausalLM)), (precision, 10**6, micro_tokens)
        proof = prove(self.policy)
        assert proof["layout"] == "tree", proof
        self.encoded = [
            Encoded(p + a, [False] * len(p) + [True] * len(a), str(k)) for k, (p, a) in enumerate(texts)
        ]  # fmt: skip
        lengths, answers = [len(e.ids) for e in self.encoded], sum(len(a) for _, a in texts)
        self.tokens = sum(lengths)
        self.flops = (
            operations(self.tokens, answers, sum(n * (n + 1) / 2 for n in lengths), full=True) / 3
        )  # forward alone
        self.answers = answers

    def epoch(self) -> None:
        from temper.stages.scoring import likelihood

        self.found = likelihood(self.policy, self.encoded, *self.how)

    def loss(self) -> float:
        """Mean negative log-probability of the answers' tokens."""
        self.epoch()
        assert sum(self.found["tokens"]) == self.answers
        return float(sum(self.found["nll"])) / self.answers


class Padded:
    """transformers, `size` texts at a time."""

    tokens, flops = 0, 0.0

    def __init__(self, texts: list[Text], *, precision: str, size: int, tuned: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.model, self.half, self.tuned = loaded(AutoModelForCausalLM), precision == "bf16", tuned
        order = sorted(range(len(texts)), key=lambda k: len(texts[k][0]) + len(texts[k][1]), reverse=True)
        self.texts = [texts[k] for k in order] if tuned else texts
        self.size = size

    @torch.inference_mode()
    def epoch(self) -> None:
        self.found: list[float] = []
        for k in range(0, len(self.texts), self.size):
            some = self.texts[k : k + self.size]
            width = max(len(p) + len(a) for p, a in some)
            ids, mask, scored = (torch.zeros(len(some), width, dtype=torch.long) for _ in range(3))
            for line, (prompt, answer) in enumerate(some):
                n, end = len(prompt), len(prompt) + len(answer)
                ids[line, :end], mask[line, :end], scored[line, n:end] = torch.tensor(prompt + answer), 1, 1
            lines, places = scored.nonzero(as_tuple=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                asked = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
                if self.tuned:
                    logits = self.model.lm_head(self.model.model(**asked).last_hidden_state[lines, places - 1])
                else:
                    logits = self.model(**asked).logits[lines, places - 1]
            chosen = logits.float().log_softmax(-1).gather(-1, ids[lines, places, None])[:, 0]
            self.found += torch.zeros(len(some), dtype=torch.float64).index_add_(0, lines, chosen.double()).tolist()

    def loss(self) -> float:
        self.epoch()
        return -sum(self.found) / sum(len(a) for _, a in self.texts)


def _contests() -> list[Contest]:
    out = []
    for precision in ("float32", "bf16"):
        name, both = f"scoring-{precision}", {"precision": precision}
        out.append(
            Contest(
                name, "transformers padded", made, tool="transformers", asked=2, ours=both, theirs={**both, "size": 8}
            )
        )
        grid = tuple({"size": size, "tuned": True} for size in (1, 2, 4, 8, 16))
        out.append(
            Contest(
                name,
                "transformers sorted by length",
                made,
                tool="transformers",
                asked=1.2,
                ours=both,
                theirs=both,
                grid=grid,
            )
        )
    return out


CONTESTS = _contests()
