"""Writes a whole model, or an adapter that cannot be folded in, and compares what was written with what was trained."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from temper import hub
from temper.chat import form_of
from temper.data.card import read_rows
from temper.data.chat import Encoder
from temper.data.forms import is_text
from temper.errors import ModelError, RunError
from temper.export.card import write_card
from temper.export.gguf import Packing, write_gguf
from temper.models import adapted, adapters, load
from temper.models.scores import Policy
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.runfolder import read_json
from temper.trees import chain, join
from temper.types import Record

Kind = Literal["safetensors", "gguf"]
Precision = Literal["float32", "bf16", "fp16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPARED, NEW_TOKENS = 8, 32  # rows on which what was written is compared, tokens of their answers
ALLOWED = {"float32": 1e-2, "bf16": 0.5, "fp16": 0.1}  # nats of a token's log-probability, by the precision written in
FALLBACK = ["Hello! How are you?", "1 2 3 4 5 6 7 8 9", "Привет! Как дела?"]  # where no rows are known


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and how it compares: a sentence."""

    path: Path
    compared: str


def export(
    name: str,
    out: Path,
    *,
    kind: Kind = "safetensors",
    precision: Precision | None = None,
    packing: Packing = "f16",
    licence: str | None = None,
    apart: bool = False,
) -> Exported:
    """Write a model by its name (a stage's folder, a model's or an adapter's, a hub id) into a new folder.

    Args:
        precision: of the weights in safetensors; None: float32, of an adapter kept apart its own.
        packing: of the matrices in GGUF.
        licence: for the card; by default what the base's own card says.
        apart: an adapter is written as an adapter, in PEFT's format, not folded into its base; virtual tokens always are.

    Raises:
        RunError: there is something in the folder.
        ModelError: the model cannot be opened or written so; what was written answers otherwise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is there already", do="name a new folder; nothing is overwritten")
    source = hub.locate(name, Path())
    hf, _ = adapters.open_model(source, dtype=torch.float32, packed=False)
    tokenizer = load.tokenizer(source)
    records = rows_of_run(name)
    rows = _rows(records, name, tokenizer, hf)
    policy = _policy(hf)
    before = _answers(policy, tokenizer, rows)
    soft = _soft(hf)
    keeps = apart or soft
    if keeps:
        _check_apart(name, source, hf, soft, kind, precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside) / "made"
        if keeps:
            shutil.copytree(source.adapters[-1], folder)
            written = _reopened(source, folder)
        else:
            whole, _ = adapters.merged(hf) if isinstance(hf, PeftModel) else (hf, 0.0)
            load.save(whole.to(DTYPES[precision or "float32"]), tokenizer, folder, ends=adapters.trained_ends(source))  # type: ignore[arg-type]  # fmt: skip
            written = _reopened(hub.Source(str(folder)), None)
        compared = _compared(
            before, _answers(_policy(written), tokenizer, rows), precision or "float32", known=bool(records)
        )
        if keeps:
            compared = (
                f"kept apart as an adapter{', for virtual tokens cannot be folded in' if soft else ''}; {compared}"
            )
        if kind == "gguf":
            compared += "; " + write_gguf(written, tokenizer, folder, packing, [ids for ids, _ in rows])
        write_card(folder, name, source, compared, licence)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # a server under another account reads them
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    return Exported(out, compared)


def _soft(hf: Any) -> bool:
    return any(adapted.kind(part) in adapted.WORDS | adapted.KEYS for part in adapted.parts(hf))


def _check_apart(name: str, source: hub.Source, hf: Any, soft: bool, kind: Kind, precision: Precision | None) -> None:
    """ModelError where there is no adapter to keep apart, or where it cannot be written so."""
    if not isinstance(hf, PeftModel):
        raise ModelError(f"{name} is a whole model: there is no adapter to keep apart", do="leave --apart out")
    if len(source.adapters) > 1:
        raise ModelError(
            f"{name} is an adapter on top of another one: alone its answers would be others",
            do="export what it stands on first, or leave --apart out",
        )
    if kind == "gguf" or precision:
        what = "GGUF holds whole models" if kind == "gguf" else "an adapter is written in the precision that it has"
        why = "virtual tokens cannot be folded into one" if soft else "it was asked to be kept apart"
        raise ModelError(
            f"{what}, and {why}", do="leave --format and --precision out" + ("" if soft else ", or --apart")
        )


def rows_of_run(name: str, most: int = COMPARED) -> list[Record]:
    """Test rows of the data that a stage of a run was trained on; none where the model is of no run that is here."""
    folder = hub.stage_folder(name)
    if folder is None:
        return []
    config = read_json(folder / "stage.json").get("config", {})
    for _ in range(8):  # a merge names a model, a model its data
        if "data" in config:
            break
        beside = folder.parent / str(config.get("model"))
        if not (beside / "stage.json").is_file():
            return []
        config = read_json(beside / "stage.json").get("config", {})
    data = folder.parent / str(config.get("data", "")).partition(".")[0] / "data"
    path = next((p for s in ("test", "validation", "train") if (p := data / f"{s}.parquet").is_file()), None)
    return [] if path is None else read_rows(path)[:most]


Rows = list[tuple[list[int], int]]  # token ids, and where the answer begins in them


def _rows(records: Sequence[Record], name: str, tokenizer: Any, hf: Any) -> Rows:
    """Real prompts with their answers as the model was trained on them; a few plain texts where none are known."""
    apart = bool(adapted.inner(hf).config.is_encoder_decoder)
    encoder = Encoder(tokenizer, form_of(name), end_ids=load.end_ids(adapted.inner(hf)), apart=apart)
    usable = [r for r in records if is_text(r.row) or "completion" in r.row or "messages" in r.row]
    if not usable:
        usable = [Record({"prompt": t, "completion": t} if apart else {"text": t}, "a plain text") for t in FALLBACK]
    room = load.context(adapted.inner(hf)) or 10**9
    found = [(e.ids[:room], min(e.prompt_length, room - 1)) for e in encoder.encode(usable)]
    return [(ids, max(1, k)) for ids, k in found]


def _policy(hf: Any) -> Policy:
    policy = Policy(hf, "padded")
    policy.eval()
    return policy


def _answers(policy: Policy, tokenizer: Any, rows: Rows) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probabilities of the answers' tokens, and what is answered greedily."""
    scored = [join([chain(ids, [float(i >= k) for i in range(len(ids))])]) for ids, k in rows]
    with torch.no_grad():
        found = torch.cat([policy(row.to(policy.device)).float().cpu() for row in scored])
    sampler = Sampler(policy.hf, tokenizer, end_ids=load.end_ids(policy.inner))
    prompts = [ids[:k] for ids, k in rows]
    room = load.context(policy.inner) or 10**9
    new = max(1, min(NEW_TOKENS, room - max(map(len, prompts)))) if not policy.apart else NEW_TOKENS
    drawn = sampler.sample(prompts, Decoding(max_new_tokens=new))
    return found, [list(one.ids) for (one,) in drawn]


def _reopened(source: hub.Source, adapter: Path | None) -> Any:
    """What was just written, as anybody would open it."""
    if adapter is not None:
        source = dataclasses.replace(source, adapters=(*source.adapters[:-1], str(adapter)))
    return adapters.open_model(source, dtype=torch.float32, packed=False)[0]


def _compared(before: Any, after: Any, precision: str, *, known: bool) -> str:
    """How what was written compares with what was trained.

    Raises:
        ModelError: it answers otherwise by more than rounding.
    """
    difference = (before[0] - after[0]).abs().max().item()
    same = sum(a == b for a, b in zip(before[1], after[1], strict=True))
    of = f"{len(before[1])} {'real prompts' if known else 'plain texts'}"
    if difference > ALLOWED[precision]:
        raise ModelError(
            f"the model as written differs from the one that was trained by up to {difference:.2g} nats a token on {of}",
            do="precision: float32 rounds nothing" if precision != "float32" else "keep the adapter apart: --apart",
        )
    return f"on {of} log-probabilities of the answers' tokens differ by at most {difference:.1e} nats, {same} greedy answers are the same"
