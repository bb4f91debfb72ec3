"""merge: fold an adapter into its base, as a stage of its own."""

from __future__ import annotations

from peft import PeftModel

from temper.engine import device as devices
from temper.errors import ModelError
from temper.job import Job
from temper.models import adapters, load
from temper.models.scores import Policy
from temper.recipe import ModelRef, Stage, detail, stages
from temper.stages.training import note_trained_on, proven_merge, settle
from temper.trees import chain, join


@stages.register("merge")
class Merge(Stage):
    """The whole model that an adapter and its base stand for."""

    kind = "merge"
    gives = "model"

    model: ModelRef = detail(..., "A stage or folder that holds an adapter.")

    def run(self, job: Job) -> None:
        device = devices.setup(job.recipe.device, job.recipe.threads)
        source = job.model(self.model)
        hf, notices = adapters.open_model(source, device=device, trust_remote_code=job.recipe.trust_remote_code)
        if not isinstance(hf, PeftModel):
            raise ModelError(
                f"{self.model} holds no adapter, so there is nothing to merge", do="name a stage that trains an adapter"
            )
        for notice in notices:
            job.warn(notice)
        tokenizer = load.tokenizer(source, trust_remote_code=job.recipe.trust_remote_code)
        policy = Policy(hf)
        settle(job, policy, "auto", 64, device, "float32")
        probe = tokenizer("0 1 2 3 4 5 6 7 8 9 — А Б В a b c", add_special_tokens=True)["input_ids"]
        out = proven_merge(job, policy, join([chain(probe, [1.0] * len(probe))]))
        job.counts["parameters"] = load.parameters(out)[0]
        load.save(out, tokenizer, job.dir / "model", ends=adapters.trained_ends(source))
        note_trained_on(job, [])
        if written := next((f for r in job.inputs.values() if (f := r.info["facts"].get("written_as"))), None):
            job.facts["written_as"] = written
