"""The model card: README.md beside the weights, in the form that the hub reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from temper import hub, overlay
from temper.errors import RunError
from temper.models import adapters
from temper.report import markdown, phrases, tables
from temper.report.read import Run, Stage, read_run
from temper.report.ways import ways

UNKNOWN = "other"
KINDS = {
    "adapter_config.json": "peft",
    "temper.json": "peft",
    "model.gguf": "gguf",
}  # a file that tells → how the hub calls it
PATH = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?/[^\s\"',\]}#]+")  # of this machine: it means nothing elsewhere
BITS = {
    "nf4": 'held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "int8": "held = BitsAndBytesConfig(load_in_8bit=True)",
}
OPEN = "---"


def write_card(folder: Path, name: str, source: hub.Source, compared: str, licence: str | None) -> None:
    """README.md in the folder of an exported model: what it is, its scores, its data, its recipe, its licence.

    Args:
        name: the model as it was asked for; of a stage of a run the card has the run's results.
        compared: how what was written compares with what was trained.
        licence: by default what the base's own card says.
    """
    run, stage = _run_of(name)
    base = _base(source, run)
    given, licence = licence, licence or _licence(source, run)
    title = f"{run.manifest.recipe or run.name}: {stage.name}" if run and stage else Path(name).name
    kind = next((k for file, k in KINDS.items() if (folder / file).is_file()), "transformers")
    head: dict[str, Any] = {"library_name": kind}
    head |= {"license": licence or UNKNOWN, "base_model": base, "tags": ["temper", *([stage.kind] if stage else [])]}
    if run and (found := [s.card.source for s in run.stages if s.card and "/" in s.card.source and ":" not in s.card.source]):  # fmt: skip
        head["datasets"] = sorted({x for x in found if not x.startswith(("/", "."))})
    lines = [OPEN, *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value), OPEN]
    parts = ["\n".join(lines), f"# {title}", _what(run, stage, base), f"As written here: {compared}."]
    parts += ["## Use", _use(folder, kind, source, base, _began_as(run, stage))]
    if run and stage:
        recipe = PATH.sub(lambda m: Path(m[0]).name, run.recipe.removeprefix("%YAML 1.2\n---\n").strip())
        parts += [*_results(run, stage), *_data(run, stage), "## Recipe", f"```yaml\n{recipe}\n```"]
    parts += ["## Licence", _of_licence(given, licence, base)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _run_of(name: str) -> tuple[Run | None, Stage | None]:
    folder = hub.stage_folder(name)
    if folder is None:
        return None, None
    try:
        run = read_run(folder.parent)
    except RunError:
        return None, None
    return run, next((s for s in run.stages if s.name == folder.resolve().name), None)


def _base(source: hub.Source, run: Run | None) -> str:
    """What it began as, by a name that means something elsewhere: a hub id, or the recipe's model."""
    if not source.local:
        return source.name
    named = _setting(run, "model")
    return named if named and run and named not in {s.name for s in run.stages} else ""


def _setting(run: Run | None, key: str) -> str:
    found = overlay.yaml().load(run.recipe) if run and run.recipe else None
    return str(found.get(key, "")) if isinstance(found, dict) else ""


def _licence(source: hub.Source, run: Run | None) -> str | None:
    """What the card of the base says, if it has one here."""
    for folder in (source.name, _setting(run, "model")):
        readme = Path(folder) / "README.md"
        if folder and readme.is_file() and (text := readme.read_text("utf-8", errors="replace")).startswith(OPEN):
            head = text.split(OPEN)[1]
            if line := next((x for x in head.splitlines() if x.startswith("license:")), None):
                return line.partition(":")[2].strip().strip("\"'")
    return None


def _what(run: Run | None, stage: Stage | None, base: str) -> str:
    if not (run and stage and stage.info):
        return "A language model, written by Temper."
    i = stage.info
    began = i.config.get("model")
    if began == "base":
        began = _setting(run, "model")
    words = [f"Made by the stage `{stage.name}` ({stage.kind}) of the recipe `{run.manifest.recipe or run.name}`"]
    words.append(f"from `{base or began}`" if base or began else "")
    facts = [f"{phrases.count(i.examples)} examples" if i.examples else "", f"{phrases.count(i.steps)} steps" if i.steps else ""]  # fmt: skip
    if i.trainable_parameters and i.parameters:
        facts.append(f"{phrases.count(i.trainable_parameters)} of {phrases.count(i.parameters)} parameters trained")
    if adapter := i.facts.get("adapter"):
        facts.append(str(adapter))
    if held := i.facts.get("base held in"):
        facts.append(f"its base held in {held}")
    told = "; ".join(x for x in facts if x)
    written = i.facts.get("written_as")
    text = " ".join(x for x in words if x) + (f": {told}." if told else ".")
    return f"{text}\n\nPrompts are written as: {written}." if written else text


def _results(run: Run, stage: Stage) -> list[str]:
    out = []
    for name, evaluation in run.evaluations.items():
        if stage.name not in evaluation.models and not _began(stage) & evaluation.models.keys():
            continue
        told = (
            f"{evaluation.data.get('name', name)}, {phrases.count(evaluation.data.get('rows'))} rows; 95 % intervals."
        )
        at = next(s for s in run.stages if s.name == name)
        out += [f"## Results: {name}", told, markdown.table(tables.results_table(evaluation, at.rows, tables.judge(run, at)))]  # fmt: skip
        if costs := ways(run, evaluation):
            out += [f"### {costs.title}", markdown.table(costs)]
        if evaluation.comparisons:
            out += ["### Comparisons", markdown.table(tables.comparisons_table(evaluation))]
    return out


def _began(stage: Stage) -> set[str]:
    """Of a merge: what it was made of."""
    config = stage.info.config if stage.info and stage.kind == "merge" else {}
    return {str(config.get("model")), *map(str, config.get("models") or [])}


def _data(run: Run, of: Stage) -> list[str]:
    """The data that the model was made of, directly or by what it began as."""
    known = {s.name: s for s in run.stages}
    led, new = set[str](), [of.name]
    while new:
        name = new.pop()
        led.add(name)
        info = known[name].info if name in known else None
        new += [n for n in (info.inputs if info else {}) if n in known and n not in led]
    out = []
    for stage in run.stages:
        if stage.card and stage.name in led:
            at = f" at {stage.card.revision}" if stage.card.revision else ""
            out += [f"## Data: {stage.name}", f"`{Path(stage.card.source).name if stage.card.source.startswith('/') else stage.card.source}`{at}", markdown.table(tables.rows_table(stage.card))]  # fmt: skip
    return out


def _of_licence(given: str | None, licence: str | None, base: str) -> str:
    whose = f"`{base}`" if base else "the model it began as"
    if given:
        return f"{given}. {whose[0].upper()}{whose[1:]} and the data have licences of their own."
    if licence is None:
        return f"Not known here: that of {whose} applies, and those of the data."
    return f"{licence}, as {whose} has it; the data have licences of their own."


def _use(folder: Path, kind: str, source: hub.Source, base: str, began: str) -> str:
    if kind == "gguf":
        return "```bash\nollama create NAME -f Modelfile\n```"
    held = adapters.held(source)
    if kind == "peft":
        told = base or f"the base that it was trained on ({began or Path(source.name).name}), which is not part of this folder"  # fmt: skip
        more = BITS.get(held or "", "")
        on = f"AutoModelForCausalLM.from_pretrained(BASE{', quantization_config=held' if more else ''})"
        lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM" + (", BitsAndBytesConfig" if more else ""), "",
                 *([more] if more else []), f"model = PeftModel.from_pretrained({on}, FOLDER)"]  # fmt: skip
        rounded = f" It was trained on that base held in {held}: on another one it gives other answers." if held else ""
        return f"An adapter for {told}.{rounded}\n\n```python\n" + "\n".join(lines) + "\n```"
    apart = hub.read_config(str(folder)).get("is_encoder_decoder")
    auto = "AutoModelForSeq2SeqLM" if apart else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", "", f"model = {auto}.from_pretrained(FOLDER)", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]  # fmt: skip
    return "```python\n" + "\n".join(lines) + "\n```"


def _began_as(run: Run | None, stage: Stage | None) -> str:
    """What a stage's model began as, in words; empty where it is of no run."""
    if not (run and stage and stage.info):
        return ""
    name = str(stage.info.config.get("model"))
    return f"the stage `{_setting(run, 'model') if name == 'base' else name}` of the same run"
