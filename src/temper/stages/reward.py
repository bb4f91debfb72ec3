"""reward: a model that gives a number to a text, trained on pairs of which one text is preferred."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from pydantic import field_validator
from scipy.stats import rankdata

from temper import statistics
from temper.data.forms import Format
from temper.engine import device as devices
from temper.engine.batches import Batches
from temper.engine.loop import Loop
from temper.engine.settings import Validated, at_once
from temper.errors import ModelError, RecipeError
from temper.hub import Source
from temper.job import Job
from temper.losses import Terms, pair_losses
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.models.classify import untrained
from temper.models.reward import RewardModel, reads_tips, with_end
from temper.recipe import DataRef, ModelRef, Stage, detail, stages
from temper.runfolder import write_json
from temper.stages import pairs as pairing
from temper.stages.beforehand import summarise
from temper.stages.pairs import Coded, DrawnPairs
from temper.stages.seen import note_trained_on
from temper.stages.sft import format_of
from temper.stages.training import note_used, proven_merge, read_split
from temper.trees import rows_of
from temper.types import Record, Scores

SPLITS = ("train", "validation", "test")
CHECKED = 16  # texts on which the saved model is compared with the one that was trained
CENTRED = 4000  # texts at most that the mean is taken of
RESAMPLES = 2000  # of the held-out texts or pairs


@stages.register("reward")
class TrainReward(Stage, Validated):
    """Train a reward model on pairs (Bradley–Terry): columns chosen and rejected, or texts with a label."""

    kind = "reward"
    version = 3
    gives = "reward"
    together = True
    trains_on = ("train",)

    model: ModelRef = detail(
        "base", "What it starts from, encoder or decoder: a stage, base, a folder, or a hub id (id@revision)."
    )
    data: DataRef = detail(..., "A data stage with chosen and rejected (and prompt), or with text and label.")
    positive: str | int | bool | None = detail(None, "Of rows with labels: the label that is preferred to all others.")
    pairs: int | None = detail(
        None, "Of rows with labels: pairs drawn an epoch; null: as many as the commoner side has texts.", ge=1
    )
    loss: str | dict[str, Any] = detail(
        "bradley_terry", "A name or {name: {option: value}}; see `temper list pair_losses`."
    )
    centre: bool = detail(False, "Move the mean reward of the training texts to 0 at the end, in the weights saved.")
    longer: Literal["drop", "cut"] = detail(
        "drop", "Texts longer than the model's context: drop (with the pair, counted), or cut to their beginnings."
    )
    micro_tokens: int = at_once(1024)
    dropout: bool = detail(False, "Keep the model's own dropout while training.")
    adapter: Adapter | None = detail(None, "Train an adapter and the head instead of the whole model; it is folded in.")
    attention: load.Attention = detail("auto", "auto, sdpa, eager or flash_attention_2.")
    layout: str = detail(
        "auto",
        "auto: trees where they are proven equal on this model, else padded; tree insists, padded does without.",
        pattern="^(auto|tree|padded)$",
    )

    @field_validator("loss")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        _loss(value)
        return value

    def run(self, job: Job) -> None:
        records = {s: read_split(job, self.data.partition(".")[0], s, optional=s != "train") for s in SPLITS}
        source = job.model(self.model)
        tokenizer = load.tokenizer(source, trust_remote_code=job.recipe.trust_remote_code)
        texts = self._texts(job, records, tokenizer)
        device = devices.of(job.recipe)
        precision = devices.precision(self.precision, device)
        model = self._open(job, source, tokenizer, device, precision)
        data, notes = self._coded(job, model, texts)
        self._settle(job, model, data, device, precision)
        note_trained_on(job, records["train"])
        loop, batches, lines = self._loop(job, model, data, precision)
        chosen, rejected = (data["train"].ids[i] for i in data["train"].pairs(job.seed, [0])[0])
        shown = "\n".join(f"⟦{model.lines.tokenizer.decode(ids)[:600]}⟧" for ids in (chosen, rejected))
        summarise(job, loop, [*lines, *notes], batches.trees, shown)
        loop.run()
        job.peak_device_memory = devices.peak_memory(device)
        if isinstance(model.hf, PeftModel):  # afterwards model.hf is a plain model, with its head
            proven_merge(job, model, batches.rows(0)[0])
            job.facts["merge"] = str(job.facts["merge"]).replace("log-probabilities", "rewards")
        if self.centre:
            job.facts["centred"] = model.centre(_balanced(data["train"]), micro_tokens=self.micro_tokens)
            job.say(f"centred: {job.facts['centred']}")
        self._measure(job, model, data, precision)
        load.save(model.inner, model.lines.tokenizer, job.dir / "model")
        _check_saved(job, model, data["train"].ids[:CHECKED], self.attention)

    def _texts(self, job: Job, records: dict[str, list[Record]], tokenizer: Any) -> dict[str, pairing.Texts]:
        """The texts of the splits that have pairs."""
        form: Format = format_of(job, self.data)
        wanted = None if self.positive is None else pairing.name_of(self.positive)
        out: dict[str, pairing.Texts] = {}
        for split, rows in records.items():
            if split != "train" and out["train"].drawn and rows:
                labels = {pairing.name_of(r.row.get("label")) for r in rows}
                if wanted not in labels or len(labels) < 2:
                    job.warn(f"all rows of {split} have labels of one side, so no pair of them can be held out")
                    continue
            if rows:
                out[split] = pairing.read(rows, form, tokenizer, wanted)
        if self.pairs is not None and not out["train"].drawn:
            raise RecipeError(
                f"pairs: {self.pairs} is for pairs that are drawn from labels; these rows are pairs already",
                do="leave pairs out; max_steps or epochs say how many are trained on",
            )
        return out

    def _open(self, job: Job, source: Source, tokenizer: Any, device: torch.device, precision: str) -> RewardModel:
        """The base with a fresh head of one output, the adapter on it."""
        hf, notices = untrained(
            source, ["reward"], seed=job.seed, attention=self.attention, trust_remote_code=job.recipe.trust_remote_code
        )
        hf.config.problem_type = "regression"  # the output is a number: nothing makes a probability of it
        if reads_tips(hf):
            tokenizer, ended = with_end(tokenizer)
            job.facts["texts end with"] = str(tokenizer.eos_token) if ended else "their last word"
            if hf.config.pad_token_id == tokenizer.eos_token_id:  # the head would skip what every text ends with
                hf.config.pad_token_id = hf.config.get_text_config().pad_token_id = None
        hf.to(device)
        if not self.dropout:
            load.no_dropout(hf)  # before the adapter, whose dropout is a setting of its own
        if self.adapter is not None:
            hf = adapters.attach(hf, self.adapter, job.seed, task="SEQ_CLS")
        if self.activation_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with devices.autocast(device, precision):
            model = RewardModel(hf, tokenizer)
        for notice in [*notices, *model.notices]:
            job.warn(notice)
        return model

    def _coded(
        self, job: Job, model: RewardModel, texts: dict[str, pairing.Texts]
    ) -> tuple[dict[str, Coded], list[str]]:
        """Token ids within the context, and a sentence on those that were not."""
        context, notes, out = model.lines.context, list[str](), dict[str, Coded]()
        cut: Callable[[list[int]], list[int]] | None = None
        if self.longer == "cut":
            cut = lambda ids: model.lines.windows(ids)[0]  # noqa: E731
        for split, some in texts.items():
            ids = model.encode(some.texts)
            long = sum(len(line) > context for line in ids)
            out[split] = pairing.coded(some, ids, context=context, cut=cut)
            if long:
                what = "cut to their beginnings" if cut else f"dropped, and {len(out[split].ids):,} are left"
                text = f"{long:,} of {len(ids):,} texts of {split} are longer than the model's context ({context} tokens): {what}"
                notes.append(text)
                job.warn(text)
        model.check_ends([line for some in out.values() for line in some.ids])
        return out, notes

    def _settle(
        self, job: Job, model: RewardModel, data: dict[str, Coded], device: torch.device, precision: str
    ) -> None:
        longest = max(len(line) for line in data["train"].ids)
        with devices.autocast(device, precision):
            proof = model.settle(self.layout, longest)
        text = str(proof["reason"])
        if proof.get("difference") is not None:
            text += f" (scores differ by at most {proof['difference']:.1e}; by {proof['control']:.1e} if the mask were wrong)"
        note_used(job, model, precision, text)

    def _loop(
        self, job: Job, model: RewardModel, data: dict[str, Coded], precision: str
    ) -> tuple[Loop, Batches, list[str]]:
        """The loop over pairs, and lines on them for the summary."""
        share, train = model.on_tips, data["train"]
        row_tokens = self.row_tokens if model.layout == "tree" else 16  # padded: like lengths together, nothing packed
        make = functools.partial(train.trees, job.seed, share=share)
        sizes = [int(train.preferred.sum()), int((~train.preferred).sum())]
        how = (self.batch_size * self.accumulation, row_tokens, self.micro_tokens, job.seed)
        if train.drawn:
            n = self.pairs or max(sizes)
            batches: Batches = DrawnPairs(make(range(n)), *how, make=make)
            lines = [
                f"pairs: {n:,} drawn an epoch, of {sizes[0]:,} preferred and {sizes[1]:,} other texts "
                f"({sizes[0] * sizes[1]:,} pairs there are)"
            ]
        else:
            batches = Batches(make(range(len(train.ids) // 2)), *how)
            lines = [f"pairs: {len(batches.trees):,} to train on"]
        held: list[Any] = []
        if "validation" in data:
            some = data["validation"]
            p = int(some.preferred.sum())
            held = some.trees(job.seed, range(max(p, len(some.ids) - p) if some.drawn else p), share=share)
        lines[0] += f", {len(held):,} for validation"
        if model.layout == "tree":
            every = sum(len(t.path(0)) + len(t.path(1)) for t in batches.trees)
            shared = 1 - sum(len(t) for t in batches.trees) / every
            lines.append(
                f"beginnings that both texts of a pair share are computed once: {shared:.0%} of all tokens saved"
            )
        validation = rows_of(held, row_tokens, self.micro_tokens)
        job.counts["examples"] = len(batches.trees)
        return Loop(job, model, _loss(self.loss), batches, self, precision, validation), batches, lines

    def _measure(self, job: Job, model: RewardModel, data: dict[str, Coded], precision: str) -> None:
        """How often the order of held-out pairs, and the sign of held-out rewards, is right."""
        found: dict[str, Any] = {"centred": self.centre, "splits": {}}
        if len(data) == 1:
            job.warn("there are no validation or test pairs, so nothing is known of how well the reward model does")
        for split in [s for s in SPLITS[1:] if s in data]:
            with devices.autocast(model.device, precision):
                rewards = model.score(data[split].ids)
            order, signs = accuracy(rewards, data[split]), right_signs(rewards, data[split])
            values = {name: _value(s, job.seed) for name, s in (("accuracy", order), ("right_signs", signs))}
            p = int(data[split].preferred.sum())
            n = p * (len(rewards) - p) if data[split].drawn else p
            found["splits"][split] = {**values, "pairs": n, "mean": float(rewards.mean()), "sd": float(rewards.std())}
            for name, v in values.items():
                job.facts[f"{split} {name.replace('_', ' ')}"] = round(v["value"], 4)
            line = (
                f"{split}: {_share(values['accuracy'])} of {n:,} pairs in the right order, "
                f"{_share(values['right_signs'])} of signs right; rewards {rewards.mean():.2f} ± {rewards.std():.2f}"
            )
            job.summary += f"\n{line}"
            job.say(line)
            low = values["accuracy"]["low"]
            if split == "test" and (low is None or low <= 0.5):
                job.warn("on held-out pairs the reward model cannot be told from chance")
        write_json(job.dir / "reward.json", found)


def _loss(value: str | dict[str, Any]) -> Callable[..., Terms]:
    """A loss of pairs with the options of the recipe."""
    if isinstance(value, dict) and len(value) != 1:
        raise RecipeError(
            f"{value!r} is not one pair loss", where="loss", do="write a name, or {name: {option: value}}"
        )
    name, options = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    return functools.partial(
        pair_losses.get(name, where="loss"), **pair_losses.check(name, options or {}, where="loss")
    )


def _balanced(data: Coded) -> list[list[int]]:
    """Training texts, as many preferred as others, spread evenly over those there are."""
    sides = [np.flatnonzero(data.preferred), np.flatnonzero(~data.preferred)]
    n = min(CENTRED // 2, *map(len, sides))
    return [data.ids[side[k * len(side) // n]] for side in sides for k in range(n)]


def accuracy(rewards: np.ndarray, data: Coded) -> Scores:
    """The share of pairs whose chosen text has the higher reward; ties count half.

    Of drawn pairs all there are count, by ranks (Mann and Whitney 1947), and the texts are what is resampled.
    """
    if not data.drawn:
        difference = rewards[::2] - rewards[1::2]
        return Scores.mean((np.sign(difference) + 1) / 2, "pair_accuracy")

    def share(rows: np.ndarray) -> np.ndarray:
        """[..., M] indices of texts → [...]; a resample of one side alone says nothing."""
        index = rows.astype(np.int64)
        preferred = data.preferred[index]
        p = preferred.sum(-1).astype(np.float64)
        pairs = p * (rows.shape[-1] - p)
        right = (rankdata(rewards[index], axis=-1) * preferred).sum(-1) - p * (p + 1) / 2
        return np.where(pairs > 0, right / np.maximum(pairs, 1), 0.5)

    return Scores.order(np.arange(len(rewards)), share, "pair_accuracy|all pairs")


def right_signs(rewards: np.ndarray, data: Coded) -> Scores:
    """The share of texts whose reward is above 0 where they are preferred and below where not; 0 counts half."""
    rows = (np.sign(rewards) * np.where(data.preferred, 1, -1) + 1) / 2
    return Scores.mean(rows if data.drawn else rows.reshape(-1, 2).mean(1), "right_signs")


def _value(scores: Scores, seed: int) -> dict[str, Any]:
    low, high = statistics.interval(scores, seed=seed, resamples=RESAMPLES) or (None, None)
    return {"value": scores.value, "low": low, "high": high, "n": len(scores.rows)}


def _share(value: dict[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['value']:.1%}"
    return f"{value['value']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _check_saved(
    job: Job, model: RewardModel, lines: Sequence[Sequence[int]], attention: load.Attention
) -> None:  # fmt: skip
    """Make sure that what was saved is what was trained, its head included, alone and in a padded batch.

    Raises:
        ModelError: it scores otherwise.
    """
    saved = RewardModel.open(
        Source(str(job.dir / "model")), device=model.device, attention=attention,
        trust_remote_code=job.recipe.trust_remote_code,
    )  # fmt: skip
    trained = model.score(lines)
    alone = np.concatenate([saved.score([line]) for line in lines])
    batch = saved.score(lines, batch_tokens=10**9)
    difference = max(float(np.abs(found - trained).max()) for found in (alone, batch))
    if not difference <= 1e-4 * max(1.0, float(np.abs(trained).max())):  # nan is not either
        raise ModelError(f"the saved model's rewards differ from the trained one's by up to {difference:.2g}")
    job.facts["saved"] = (
        f"opened again by transformers, its rewards equal the trained one's to {difference:.1e}, alone and in a batch"
    )
