"""What stands on a model: PEFT's adapters, one, or a soft prompt over one of another kind.

PEFT puts one kind of adapter into a PeftModel. Where a soft prompt goes with LoRA, the prompt's PeftModel stands around the
model into which LoRA's was injected, and knows it as `beneath`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

WORDS = {PeftType.PROMPT_TUNING, PeftType.P_TUNING}  # virtual tokens stand before the input
KEYS = {PeftType.PREFIX_TUNING}  # virtual tokens are keys and values of every layer


def inner(hf: Any) -> PreTrainedModel:
    """The transformers model within; the layers that LoRA and its kin put into it stay active."""
    return hf.get_base_model() if isinstance(hf, PeftModel) else hf  # type: ignore[return-value]


def parts(hf: Any) -> list[PeftModel]:
    """The adapters on a model, innermost first."""
    if not isinstance(hf, PeftModel):
        return []
    beneath = vars(hf).get("beneath")
    return [hf] if beneath is None else [beneath, hf]


def over(beneath: PeftModel, soft: PeftModel) -> PeftModel:
    """A soft prompt that was put on the model within an adapter, tied to that adapter. Both are trained."""
    vars(soft)["beneath"] = beneath  # not as a submodule: its layers are in the model already
    return soft


def kind(part: PeftModel) -> PeftType:
    return part.active_peft_config.peft_type  # type: ignore[no-any-return]


def prompting(hf: Any) -> PeftModel | None:
    """The adapter that puts virtual tokens before the input, or their keys and values, if it is on."""
    outer = next(reversed(parts(hf)), None)
    on = outer is not None and kind(outer) in WORDS | KEYS and outer.has_active_enabled_adapter
    return outer if on else None


def virtual(hf: Any) -> int:
    """Virtual tokens that every input begins with."""
    outer = prompting(hf)
    return 0 if outer is None else outer.active_peft_config.num_virtual_tokens  # type: ignore[attr-defined]


def soft(hf: Any) -> torch.Tensor | None:
    """Embeddings of the virtual tokens [V, width], where these are embeddings."""
    outer = prompting(hf)
    return None if outer is None or kind(outer) not in WORDS else outer.get_prompt(1)[0, : virtual(hf)]


def past(hf: Any, lines: int) -> Cache | None:
    """Keys and values of the virtual tokens for so many lines, where these are keys and values."""
    outer = prompting(hf)
    return None if outer is None or kind(outer) not in KEYS else outer.get_prompt(lines)  # type: ignore[return-value]


@contextlib.contextmanager
def off(hf: Any) -> Iterator[None]:
    """Within, the model is what it was without its adapters."""
    with contextlib.ExitStack() as stack:
        for part in parts(hf):
            stack.enter_context(part.disable_adapter())
        yield


def given(hf: Any, ids: torch.Tensor, words: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a backbone is given of token ids [lines, T], each line's first places taken by virtual tokens [V, width]."""
    if words is None:
        return {"input_ids": ids}
    embedded = inner(hf).get_input_embeddings()(ids[:, len(words) :])
    return {"inputs_embeds": torch.cat([words.to(embedded.dtype).expand(len(ids), -1, -1), embedded], 1)}
