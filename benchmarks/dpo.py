"""DPO on trees beside TRL's DPOTrainer: the same pairs, as token ids, from the same weights, with the same LoRA.

    python benchmarks/dpo.py [--threads 2] [--rounds 3] [--pairs 32] [--bf16] [--tuned | --documented]

A model of 40 million parameters in Qwen2's shape with random weights, vocabulary 32,000, LoRA of rank 8 on every linear
layer. A pair has a prompt of 250 to 310 tokens and two answers of 16 to 150. Timed is a pass over all pairs: batches
made, the reference asked, forward, backward, AdamW. TRL runs as documented (its defaults, but for the precision named)
and tuned: the best of a grid over the batch's size and like lengths together or not, without recomputed activations
and with the reference's log-probabilities computed before, which then costs neither side any time. Both take turns, so
that whatever else the machine does falls on both; the ratios' median and range are what counts. The loss of all pairs
before the first step is printed for both: it is ln 2, so the log-probabilities are compared too.
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
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer
from turns import in_turns, seconds

from temper.engine import optim
from temper.losses.preference import Compared, preference_losses
from temper.models.reference import Reference
from temper.models.scores import Policy, prove
from temper.trees import Row, group, rows_of

VOCABULARY, END = 32_000, 2
BATCH = 8  # pairs of an optimiser step: TRL's default
GRID = [*itertools.product((1, 2, 4, 8), (False, True))]  # pairs of one forward pass, like lengths together
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def tokenizer() -> PreTrainedTokenizerFast:
    """w5 is token 5; texts are split at spaces. Special tokens are found inside words too: theirs begin no other's."""
    made = Tokenizer(models.WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(3)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=word(0), bos_token=word(1), eos_token=word(END))


def word(i: int) -> str:
    return f"w{i}" if i > 3 else f"<{i}>"


def model(layers: int) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return get_peft_model(Qwen2ForCausalLM(config).float(), LoraConfig(**LORA))


def drawn(n: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen, rejected: token ids; both answers end with the end token."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(4, VOCABULARY, draw.integers(low, high)).tolist()  # type: ignore[no-any-return]

    return [(ids(250, 311), [*ids(15, 150), END], [*ids(15, 150), END]) for _ in range(n)]


class Ours:
    """Rows of trees through the policy; the stage's defaults."""

    def __init__(self, hf: Any, pairs: list[Any], sizes: tuple[int, int], *, bf16: bool, kept: bool) -> None:
        self.policy, self.pairs, self.sizes, self.bf16 = Policy(hf), pairs, sizes, bf16
        proof = prove(self.policy, length=461)
        print(f"temper: {proof['reason']} (largest difference {proof['difference']:.1e})")
        self.reference = Reference(self.policy)
        self.optimizer = optim.optimizers.get("adamw")(optim.groups(hf.named_parameters(), 1e-6, 0.0))
        self.kept = {id(p): self._asked(p) for p in pairs} if kept else None

    def _row(self, some: list[Any]) -> list[Row]:
        return rows_of([group(p, (a, b), str(k)) for k, (p, a, b) in enumerate(some)], *self.sizes)

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def _sums(self, logps: torch.Tensor, row: Row) -> torch.Tensor:
        """Log-probabilities of whole answers [2P]."""
        return torch.zeros(len(row.tips)).index_add(0, row.branch, logps)

    @torch.no_grad()
    def _asked(self, one: Any) -> torch.Tensor:
        (row,) = self._row([one])
        with self._autocast():
            return self._sums(self.reference(row), row)

    def losses(self, some: list[Any]) -> Iterator[torch.Tensor]:
        """The summed losses of each row of some pairs."""
        for row in self._row(some):
            with self._autocast():
                if self.kept is None:
                    anchor = self._sums(self.reference(row), row)
                else:
                    anchor = torch.cat([self.kept[id(some[int(t.origin)])] for t in row.trees])
                mine = self._sums(self.policy(row), row)
            lengths = torch.bincount(row.branch).float()
            columns = [x[k::2] for x in (mine, anchor, lengths) for k in (0, 1)]
            yield preference_losses.get("sigmoid")(Compared(*columns), beta=0.1).sum()

    @torch.no_grad()
    def logps(self, one: Any) -> torch.Tensor:
        self.policy.eval()
        (row,) = self._row([one])
        with self._autocast():
            return self._sums(self.policy(row), row)

    def epoch(self) -> None:
        self.policy.train()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        for k in range(0, len(self.pairs), BATCH):
            some = self.pairs[k : k + BATCH]
            for total in self.losses(some):
                (total / len(some)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Theirs:
    """TRL's trainer; one call of `epoch` trains on all pairs once."""

    def __init__(self, hf: Any, pairs: list[Any], folder: str, *, bf16: bool, **settings: Any) -> None:
        texts = [[" ".join(map(word, ids)) for ids in pair] for pair in pairs]
        # a space before an answer: prompt and answer are joined as they are
        rows = {n: [(" " if k else "") + t[k] for t in texts] for k, n in enumerate(("prompt", "chosen", "rejected"))}
        lengths = [len(p) + max(len(a), len(b)) for p, a, b in pairs]
        arguments = DPOConfig(
            output_dir=folder, report_to=[], bf16=bf16, use_cpu=True, num_train_epochs=1, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", length_column_name="length", **settings,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({**rows, "length": lengths})
        self.trainer = DPOTrainer(model=hf, args=arguments, processing_class=tokenizer(), train_dataset=data)
        self.trainer.remove_callback(transformers.PrinterCallback)
        found = self.trainer.train_dataset
        assert [tuple(r[f"{n}_ids"] for n in ("prompt", "chosen", "rejected")) for r in found] == [
            tuple(p) for p in pairs
        ]

    @torch.no_grad()
    def logps(self, k: int) -> torch.Tensor:
        """Log-probabilities of both answers of a pair [2]."""
        net = self.trainer.model.eval()
        batch = self.trainer.data_collator([self.trainer.train_dataset[k]])
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(self.trainer.args.bf16)):
            logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (logps * batch["completion_mask"][:, 1:]).sum(1)

    def epoch(self) -> None:
        self.trainer.train()


def tuned(hf: Any, pairs: list[Any], folder: str, *, bf16: bool) -> dict[str, Any]:
    """The fastest settings of the grid; a step stays one of BATCH pairs."""
    found: list[tuple[float, dict[str, Any]]] = []
    for size, grouped in GRID:
        settings = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size,
            "train_sampling_strategy": "group_by_length" if grouped else "random", "gradient_checkpointing": False,
            "precompute_ref_log_probs": True, "remove_unused_columns": not grouped,  # the sampler reads the lengths
        }  # fmt: skip
        theirs = Theirs(copy.deepcopy(hf), pairs, folder, bf16=bf16, **settings)
        theirs.epoch()
        took = seconds(theirs.epoch)
        print(f"trl, {size} pairs at once, {'like lengths' if grouped else 'any lengths'}: {took:.2f} s", flush=True)
        found.append((took, settings))
    return min(found, key=lambda one: one[0])[1]


def compare(name: str, ours: Ours, theirs: Theirs, rounds: int) -> None:
    """Both in turns."""
    off = max(float((ours.logps(p) - theirs.logps(k)).abs().max()) for k, p in enumerate(ours.pairs[:4]))
    print(f"{name}: log-probabilities of answers differ by up to {off:.1e} nats", flush=True)
    ours.epoch(), theirs.epoch()  # what is done once is not timed
    in_turns(name, ("temper", ours.epoch), ("trl", theirs.epoch), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--bf16", action="store_true", help="both under bfloat16 autocast")
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
        f"{'bf16' if asked.bf16 else 'float32'}, torch {torch.__version__}, trl {trl.__version__}"
    )
    sizes = (asked.row_tokens, asked.micro_tokens)
    with tempfile.TemporaryDirectory() as folder:
        if not asked.tuned:
            ours = Ours(copy.deepcopy(hf), pairs, sizes, bf16=asked.bf16, kept=False)
            compare("as documented", ours, Theirs(copy.deepcopy(hf), pairs, folder, bf16=asked.bf16), asked.rounds)
        if not asked.documented:
            best = tuned(hf, pairs[: max(8, len(pairs) // 2)], folder, bf16=asked.bf16)
            ours = Ours(copy.deepcopy(hf), pairs, sizes, bf16=asked.bf16, kept=True)
            theirs = Theirs(copy.deepcopy(hf), pairs, folder, bf16=asked.bf16, **best)
            compare("tuned", ours, theirs, asked.rounds)


if __name__ == "__main__":
    main()
