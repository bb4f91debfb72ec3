"""Reward training on trees beside TRL's RewardTrainer: the same pairs, as token ids, from the same weights.

    python benchmarks/reward.py [--threads 2] [--rounds 3] [--pairs 64] [--tuned | --documented]

A model of 40 million parameters in Qwen2's shape with random weights and a head of one output, vocabulary 32,000,
float32. A pair has a prompt of 250 to 310 tokens and two answers of 16 to 150. Timed is a pass over all pairs: batches
made, forward, backward, AdamW. TRL runs as documented (its defaults but for float32) and tuned: the best of a grid over
the batch's size, with texts of like length together or not, and without recomputed activations. Both take turns, so
that whatever else the machine does falls on both; the ratios' median and range are what counts. The loss of all pairs
before the first step is printed for both.
Run it on an idle machine: with two threads, any third busy one slows both manyfold, and not alike.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification
from trl import RewardConfig, RewardTrainer
from turns import in_turns, seconds

from temper.engine import optim
from temper.losses import bradley_terry
from temper.models.reward import RewardModel, pair
from temper.trees import rows_of

VOCABULARY = 32_000
BATCH = 8  # pairs of an optimiser step: TRL's default
GRID = [*itertools.product((2, 4, 8), (False, True))]  # pairs of one forward pass, like lengths together


def tokenizer() -> PreTrainedTokenizerFast:
    """w5 is token 5: nothing is tokenised here, but both sides want one."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


def model(layers: int) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForSequenceClassification(config).float()


def drawn(n: int) -> dict[str, list[list[int]]]:
    """n pairs of token ids, as TRL names their columns."""
    draw = np.random.default_rng(0)
    out: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
    for _ in range(n):
        prompt = draw.integers(3, VOCABULARY, draw.integers(250, 311)).tolist()
        for column in out.values():
            column.append(prompt + draw.integers(3, VOCABULARY, draw.integers(16, 151)).tolist())
    return out


class Ours:
    """Rows of trees through the reward model, the stage's defaults."""

    def __init__(self, hf: Any, pairs: dict[str, list[list[int]]], row_tokens: int, micro_tokens: int) -> None:
        self.model = RewardModel(hf, tokenizer())
        proof = self.model.settle("tree", 461)
        print(f"temper: {proof['reason']} (largest difference {proof['difference']:.1e})")
        self.pairs, self.sizes = list(zip(*pairs.values(), strict=True)), (row_tokens, micro_tokens)
        self.optimizer = optim.optimizers.get("adamw")(optim.groups(hf.named_parameters(), 1e-4, 0.0))

    def sums(self, some: list[Any]) -> Iterator[torch.Tensor]:
        """The summed losses of each row of some pairs."""
        for row in rows_of([pair(a, b) for a, b in some], *self.sizes):
            terms = bradley_terry(self.model(row), row.weight)
            yield (terms.values * terms.weights).sum()

    @torch.no_grad()
    def loss(self) -> float:
        self.model.eval()
        return sum(float(s) for s in self.sums(self.pairs)) / len(self.pairs)

    def epoch(self) -> None:
        self.model.train()
        for k in range(0, len(self.pairs), BATCH):
            some = self.pairs[k : k + BATCH]
            for total in self.sums(some):
                (total / len(some)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Theirs:
    """TRL's trainer; one call of `epoch` trains on all pairs once."""

    def __init__(self, hf: Any, pairs: dict[str, list[list[int]]], folder: str, **settings: Any) -> None:
        # lengths for the sampler that puts like ones together
        lengths = [max(len(a), len(b)) for a, b in zip(*pairs.values(), strict=True)]
        self.data = datasets.Dataset.from_dict({**pairs, "length": lengths})
        self.hf, self.folder, self.settings = hf, folder, settings
        self.trainer = self._made()

    def _made(self) -> RewardTrainer:
        arguments = RewardConfig(
            output_dir=self.folder, report_to=[], bf16=False, use_cpu=True, num_train_epochs=1, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", length_column_name="length", **self.settings,
        )  # fmt: skip
        made = RewardTrainer(model=self.hf, args=arguments, processing_class=tokenizer(), train_dataset=self.data)
        made.remove_callback(transformers.PrinterCallback)
        return made

    @torch.no_grad()
    def loss(self) -> float:
        total, n = 0.0, len(self.data)
        self.trainer.model.eval()
        for k in range(n):
            batch = self.trainer.data_collator([self.data[k]])
            total += float(self.trainer.compute_loss(self.trainer.model, dict(batch)))
        return total / n

    def epoch(self) -> None:
        self.trainer.train()


def tuned(hf: Any, pairs: dict[str, list[list[int]]], folder: str, limit: int) -> dict[str, Any]:
    """The fastest settings of the grid; a step stays one of BATCH pairs."""
    some = {name: column[:limit] for name, column in pairs.items()}
    found: list[tuple[float, dict[str, Any]]] = []
    for size, grouped in GRID:
        settings = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size,
            "train_sampling_strategy": "group_by_length" if grouped else "random", "gradient_checkpointing": False,
            "remove_unused_columns": not grouped,  # the sampler reads the column of lengths
        }  # fmt: skip
        theirs = Theirs(copy.deepcopy(hf), some, folder, **settings)
        theirs.epoch()
        took = seconds(theirs.epoch)
        print(f"trl, {size} pairs at once, {'like lengths' if grouped else 'any lengths'}: {took:.2f} s", flush=True)
        found.append((took, settings))
    return min(found, key=lambda one: one[0])[1]


def compare(name: str, ours: Ours, theirs: Theirs, rounds: int) -> None:
    """Both in turns."""
    a, b = ours.loss(), theirs.loss()
    print(f"{name}: loss of all pairs {a:.7f} and {b:.7f}, difference {abs(a - b):.1e}", flush=True)
    ours.epoch(), theirs.epoch()  # what is done once is not timed
    in_turns(name, ("temper", ours.epoch), ("trl", theirs.epoch), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--documented", action="store_true", help="only TRL as documented")
    only.add_argument("--tuned", action="store_true", help="only TRL tuned")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(asked.threads)
    hf, pairs = model(asked.layers), drawn(asked.pairs)
    print(
        f"{sum(p.numel() for p in hf.parameters()) / 1e6:.1f} M parameters, {asked.pairs} pairs, {asked.threads} threads, "
        f"torch {torch.__version__}, trl {trl.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if not asked.tuned:
            ours = Ours(copy.deepcopy(hf), pairs, asked.row_tokens, asked.micro_tokens)
            theirs = Theirs(copy.deepcopy(hf), pairs, folder)
            compare("as documented", ours, theirs, asked.rounds)
        if not asked.documented:
            best = tuned(hf, pairs, folder, min(32, asked.pairs))
            ours = Ours(copy.deepcopy(hf), pairs, asked.row_tokens, asked.micro_tokens)
            compare("tuned", ours, Theirs(copy.deepcopy(hf), pairs, folder, **best), asked.rounds)


if __name__ == "__main__":
    main()
