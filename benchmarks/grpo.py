"""GRPO: rollouts, rewards and a step on each, LoRA, the KL term on, completions of one fixed length.

No end token ever comes: it lies beyond what the model can sample, for both sides. One rollout serves one step, so neither
side computes old log-probabilities; the reference is the model with its adapter off; the reward is the mean of a
completion's token ids. TRL's loss is its default one («dapo»), which for completions of one length averages as GRPO's does.
TRL samples with transformers' `generate`, and with bf16=True still in the precision of the weights: the tuned grid has
weights in half precision as well, since of them only the adapter is trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contest, Settings, Side
from shapes import ADAPTER, FIRST, LORA, VOCABULARY, operations, text

BETA = 0.04
LONG: Settings = {"prompt": 600, "completions": 8, "new": 64, "prompts": 2, "steps": 1}
SHORT: Settings = {"prompt": 32, "completions": 4, "new": 128, "prompts": 8, "steps": 1}


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The mean token, 0 to 1: it costs nothing, and no two completions are worth the same."""
    return [sum(ids) / len(ids) / VOCABULARY for ids in completion_ids]


def endless(folder: Path) -> tuple[Path, Any]:
    """The base with an end token that its vocabulary of 32,000 lacks, and the tokenizer, which stands in its folder too."""
    import shapes

    base, own = Path(os.environ["TEMPER_BENCH_BASE"]), folder / "endless"
    own.mkdir()
    (own / "model.safetensors").symlink_to(base / "model.safetensors")
    config = shapes.config()
    config.eos_token_id = VOCABULARY
    config.save_pretrained(own)
    tokenizer = shapes.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == VOCABULARY
    tokenizer.save_pretrained(own)
    return own, tokenizer


def made(which: str, folder: Path, settings: Settings) -> Side:
    asked = dict(settings)
    shape = {name: asked.pop(name) for name in LONG}
    draw = np.random.default_rng(0)

    def ids(*size: int) -> Any:
        return draw.integers(FIRST, VOCABULARY, size).tolist()

    prompts = ids(shape["prompts"] * shape["steps"], shape["prompt"])
    recorded = ids(shape["prompts"], shape["completions"], shape["new"])
    return (_temper if which == "temper" else _trl)(folder, prompts, recorded, shape, asked)


def _temper(folder: Path, prompts: list[Any], recorded: list[Any], shape: Settings, settings: Settings) -> Side:
    import temper_side

    stage = {
        "stage": "rl", "algorithm": "grpo", "completions": shape["completions"], "batch_size": shape["prompts"],
        "decoding": {"max_new_tokens": shape["new"]}, "kl": {"beta": BETA}, "reward": ["grpo:reward"], "adapter": ADAPTER,
        "keep_best": None,
    }  # fmt: skip
    rows = [{"prompt": text(ids)} for ids in prompts]
    loop = temper_side.loop_of(folder, rows, {**stage, **settings}, model=str(endless(folder)[0]))
    side = temper_side.Practised(loop, prompts, recorded, shape["new"])
    new = len(prompts) * shape["completions"] * shape["new"]
    seen = len(prompts) * shape["prompt"] ** 2 / 2 + new * (shape["prompt"] + shape["new"] / 2)
    trained = operations(side.tokens, new, seen, full=False)
    # half of the four operations a weight, a third of those of attention: sampling and the reference are one each
    forward = operations(side.tokens, new, 0, full=False) / 2 + operations(0, 0, seen, full=False) / 3
    side.flops = trained + 2 * forward
    return side


def _trl(folder: Path, prompts: list[Any], recorded: list[Any], shape: Settings, settings: Settings) -> Side:
    import datasets
    import torch
    import trl_side
    from peft import LoraConfig
    from shapes import cool, warm
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    class Practised(trl_side.Trained):
        def epoch(self) -> None:
            self.trainer.train()
            made = len(prompts) * shape["completions"] * (shape["prompt"] + shape["new"])
            assert self.trainer.state.num_input_tokens_seen == made, "a completion ended early"

        def loss(self) -> float:
            """The same as of Temper's side: the gradient's norm on recorded completions."""
            trainer, net = self.trainer, self.trainer.model
            asked = [{"prompt": text(ids)} for ids in prompts[: len(recorded)] for _ in range(shape["completions"])]
            net.train()
            warm(net)
            if trainer.args.gradient_checkpointing:  # `train` switches it on
                net.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
            trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
            trainer.rollout_func = given
            inputs = trainer._generate_and_score_completions(asked)
            trainer.rollout_func = None
            for part in split_tensor_dict(inputs, trainer.args.gradient_accumulation_steps):
                with trainer.compute_loss_context_manager():
                    part_loss = trainer.compute_loss(net, part)
                part_loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
            net.zero_grad(set_to_none=True)
            cool(net)
            return float(norm)

    def given(texts: list[str], trainer: Any) -> dict[str, Any]:
        found = trainer.processing_class(text=texts)["input_ids"]
        assert found == [ids for ids in prompts[: len(recorded)] for _ in range(shape["completions"])]
        return {"prompt_ids": found, "completion_ids": [c for some in recorded for c in some], "logprobs": None}

    own, tokenizer = endless(folder)
    weights = getattr(torch, settings.pop("weights", "float32"))
    net = AutoModelForCausalLM.from_pretrained(own, dtype=weights)
    together = shape["prompts"] * shape["completions"]
    size = settings.pop("per_device_train_batch_size", 8)  # TRL's default
    config = GRPOConfig(
        **trl_side.arguments(folder, settings), num_generations=shape["completions"], beta=BETA,
        max_completion_length=shape["new"], per_device_train_batch_size=size,
        gradient_accumulation_steps=together // size,
    )  # fmt: skip
    assert config.generation_batch_size == together
    data = datasets.Dataset.from_dict({"prompt": [text(ids) for ids in prompts]})
    return Practised(
        GRPOTrainer(
            model=net, args=config, processing_class=tokenizer, reward_funcs=reward,
            train_dataset=data, peft_config=LoraConfig(**LORA),
        )
    )  # fmt: skip


def _contests() -> list[Contest]:
    out = []
    for name, shape, precision, plain, tuned in (
        ("grpo-long-float32", LONG, "float32", 10, 6),
        ("grpo-long-bf16", LONG, "bf16", 10, 8),
        ("grpo-short-float32", SHORT, "float32", 3, 2),
    ):
        half = precision == "bf16"
        ours, theirs = {**shape, "precision": precision}, {**shape, "bf16": half}
        out.append(Contest(name, "TRL GRPOTrainer as documented", made, asked=plain, ours=ours, theirs=theirs))
        grid = _grid(shape["prompts"] * shape["completions"], half)
        out.append(Contest(name, "TRL GRPOTrainer tuned", made, asked=tuned, ours=ours, theirs=theirs, grid=grid))
    return out


def _grid(together: int, half: bool) -> tuple[Settings, ...]:
    """Completions of one forward pass; a step and its rollout stay the same. The loss is computed in chunks in any case."""
    return tuple(
        {"per_device_train_batch_size": size, "gradient_checkpointing": False, "weights": weights}
        for weights in (("float32", "bfloat16") if half else ("float32",))
        for size in (4, 8, 16, 32)
        if size <= together
    )


CONTESTS = _contests()
