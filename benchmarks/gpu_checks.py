"""What must be right on a graphics card before anything is timed there."""

from __future__ import annotations

from typing import Any

import shapes
import torch
from gpu_machine import Bench

# The largest gap between two ways to the same numbers: nats (bf16: on average), and of a gradient against its norm.
BOUNDS = {"float32": (1e-3, 1e-3), "bf16": (0.05, 0.1)}


def check(b: Bench) -> None:
    """Trees against padded sequences and samples against their scores: a wrong number here makes all others worthless."""
    from temper.engine import device as devices
    from temper.models.proof import prove
    from temper.models.scores import Policy
    from temper.rollouts.decoding import Decoding
    from temper.rollouts.sampler import Sampler
    from temper.trees import group, join

    out: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(shapes.FIRST, shapes.VOCABULARY, (n,), generator=draw).tolist()

    row = join([group(ids(90), [ids(40), ids(25), ids(33)]), group(ids(300), [ids(20), ids(64)])]).to(b.device)
    for precision, (nats, slope) in BOUNDS.items():
        for window in (None, 64):
            hf = _sharp(window).to(b.device)
            policy = Policy(hf)
            with devices.autocast(b.device, precision):
                proof = prove(policy, length=500)
                found = {}
                for name, layout, pieces in (
                    ("padded", "padded", False), ("dense", "tree", False), ("blocks", "tree", policy.segments),
                ):  # fmt: skip
                    policy.layout, policy.segments = layout, pieces  # type: ignore[assignment]
                    logps = policy(row)
                    grads = torch.autograd.grad(logps.sum(), list(hf.parameters()))
                    found[name] = logps.detach(), torch.cat([g.flatten().float() for g in grads])
                used = policy.attention
                policy.layout = "padded"
                with torch.no_grad():
                    sampler = Sampler(hf, shapes.tokenizer(), end_ids=[])
                    prompts = [ids(30), ids(70)]
                    answers = sampler.sample(prompts, Decoding(max_new_tokens=24, temperature=1.0), completions=3)
                    own = join([group(p, [c.ids for c in cs]) for p, cs in zip(prompts, answers, strict=True)])
                    again = policy(own.to(b.device)).cpu()
            raw = torch.cat([torch.as_tensor(c.raw) for cs in answers for c in cs])
            gaps = {"sampled": (_gap(raw - again, precision), 0.0)}
            for name in ("dense", "blocks"):
                apart = found[name][1] - found["padded"][1]
                gaps[name] = (
                    _gap(found[name][0] - found["padded"][0], precision),
                    float(apart.norm() / found["padded"][1].norm()),
                )
            good = all(a <= nats and g <= slope for a, g in gaps.values()) and proof["layout"] == "tree"
            out[f"{precision}, {'windows' if window else 'no windows'}"] = {
                "as it should be": good, "bounds": {"nats": nats, "gradient": slope}, "attention": used,
                "sampler": sampler.reason, **{n: {"nats": a, "gradient": g} for n, (a, g) in gaps.items()},
            }  # fmt: skip
    b.facts["checks"] = out
    print("\n".join(f"  {name}: {found}" for name, found in out.items()), flush=True)
    b.write()
    assert all(x["as it should be"] for x in out.values()), "numbers are not what they should be: see «checks»"


def _gap(difference: torch.Tensor, precision: str) -> float:
    size = difference.float().abs()
    return float(size.max() if precision == "float32" else size.mean())


def _sharp(window: int | None) -> Any:
    """A small model whose log-probabilities spread by more than a nat; with a window, in its upper half of layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    more = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 2} if window else {}
    torch.manual_seed(0)
    hf = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shapes.VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, pad_token_id=0,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.06, **more,
        )
    )  # fmt: skip
    return hf.eval()
