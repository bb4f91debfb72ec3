"""Talking with a model: what was said so far, what it answers, and adapters that come and go.

An answer is the sampler's own for the same conversation, seed and settings; turn k of a conversation is step k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import hub, overlay
from temper.data.chat import Encoder
from temper.data.forms import Format
from temper.engine import device as devices
from temper.errors import DataError, ModelError, RecipeError, TemperError, nearest
from temper.models import adapted, adapters, load, stacks
from temper.rollouts.decoding import Decoding
from temper.rollouts.growing import Growing
from temper.rollouts.sampler import Sampler
from temper.types import Record

HELP = """/adapter NAME     put an adapter on the base; A+B: several LoRAs at once; none: take it off;
                  without a name: which there are
/system TEXT      what the model is told before the conversation; without a text: nothing
/temperature X    how freely it chooses; 0: always the likeliest
/reset            forget what was said
/quit             end, as Ctrl-D does; Ctrl-C ends an answer"""
Heard = Callable[[str], Any]


class Talk:
    """One conversation with one model.

    Args:
        source: the model, with the adapter that it begins with, if it has one.
        others: adapters by name, each a folder; of the base, not of each other.
        form: how prompts are written out, as they were in training.

    Raises:
        ModelError: the model cannot be opened.
    """

    def __init__(
        self,
        source: hub.Source,
        *,
        others: Mapping[str, Path] | None = None,
        form: Format | None = None,
        decoding: Decoding | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.base = dataclasses.replace(source, adapters=())
        own = {named(Path(source.adapters[-1])): source.adapters} if source.adapters else {}
        self.adapters = own | {name: (str(folder.resolve()),) for name, folder in (others or {}).items()}
        self.form = form or Format()
        self.decoding = decoding or Decoding(max_new_tokens=512, temperature=0.7)
        self.seed, self.device = seed, devices.setup(device, None)
        self.said: list[dict[str, str]] = []
        self.turn, self.ended = 0, True  # whether the last answer came to its end
        self.adapter: str | None = None
        self.hf: Any = None
        self.bare: Any = None  # the base without adapters, as long as it can be had back from `hf`
        self.held: str | None = None  # in how few bits it is
        self._open(next(iter(own), None))

    def _open(self, name: str | None) -> None:
        """Put an adapter, several, or none on the base, which is read anew only where it must be rounded otherwise."""
        chains = [self.adapters[part] for part in (name or "").split("+") if part]
        sources = [dataclasses.replace(self.base, adapters=chain) for chain in chains]
        held = {adapters.held(s) for s in sources} or {None}
        simple = all(len(chain) == 1 for chain in chains)  # a chain is folded into the base but for its end
        if len(chains) > 1 and not simple:
            raise ModelError("an adapter on top of another one cannot be stacked", do="take one at a time")
        if self.bare is None or not simple or held != {self.held}:
            first = sources[0] if sources else self.base
            bare, self.notices = adapters.open_base(first, device=self.device)
        else:
            bare = self.bare
        if self.hf is not None and bare is self.bare:
            stacks.taken_off(self.hf)
        hf: Any = bare
        try:
            if len(sources) > 1:
                hf = stacks.stacked(bare, sources)
            elif sources:
                hf = adapters.put_on(bare, sources[0])
        except TemperError:
            if self.hf is not None:
                self._open(self.adapter)  # as it was
            raise
        tokenizer = load.tokenizer(sources[0] if sources else self.base)
        self.model = adapted.inner(hf)
        apart = bool(self.model.config.is_encoder_decoder)
        self.encoder = Encoder(tokenizer, self.form, end_ids=load.end_ids(self.model), apart=apart)
        self.sampler = Sampler(hf.eval(), tokenizer, end_ids=self.encoder.end_ids, slots=1)
        self.adapter, self.hf, self.held = name, hf, next(iter(held))
        self.bare = bare if simple else None

    def put_on(self, name: str | None) -> None:
        """Another adapter, several of them (`A+B`), or none, on the base; what was said stays.

        Raises:
            ModelError: there is none of this name, or it belongs to another base; the model stays as it was.
        """
        parts = [] if name is None else [part.strip() for part in name.split("+")]
        for part in parts:
            if part not in self.adapters:
                there = ", ".join(self.adapters) or "none was given"
                raise ModelError(f"there is no adapter «{part}» here", where=f"there are: {there}", do=nearest(part, [*self.adapters, "none"]))  # fmt: skip
        if len(set(parts)) < len(parts):
            raise ModelError("an adapter is named twice", do="name each once")
        self._open("+".join(parts) or None)

    def answer(self, text: str, heard: Heard = lambda _: None) -> str:
        """What the model says to a text; no more than its context has room for.

        Args:
            heard: called with the answer piece by piece, as it comes.

        Raises:
            DataError: the text does not fit the model's context.
        """
        said = [*self.said, {"role": "user", "content": text}]
        ids = self._ids(said)
        growing = Growing(self.encoder.tokenizer, self.decoding.stop)
        hear = lambda written: heard(new) if (new := growing.more(written)) else None  # noqa: E731
        ((done,),) = self.sampler.sample([ids], self._fitting(len(ids)), seed=self.seed, step=self.turn, heard=hear)
        answer = growing.whole(done)
        heard(growing.end(done))
        self.ended = done.ended
        self.said, self.turn = [*said, {"role": "assistant", "content": answer}], self.turn + 1
        return answer

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        """The conversation as the model is given it; a model without a template is given the last text alone."""
        row = {"messages": said} if self.encoder.templated else {"prompt": said[-1]["content"]}
        (ids,) = self.encoder.prompts([Record(row, "the conversation")])
        return ids

    def _fitting(self, prompt: int) -> Decoding:
        """The settings, with no more new tokens than there is room for after so many of the conversation."""
        if load.has_room(self.model, prompt, self.decoding.max_new_tokens):
            return self.decoding
        context = load.context(self.model) or 0
        room = context if self.encoder.apart and prompt <= context else context - prompt
        if room < 1:
            raise DataError(
                f"the conversation has {prompt} tokens, and the model takes {context} with its answer",
                do="/reset forgets what was said",
            )
        return self.decoding.model_copy(update={"max_new_tokens": min(room, self.decoding.max_new_tokens)})

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash asks for; what to say to it.

        Raises:
            TemperError: it asks for something that there is not.
        """
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match word:
            case "/adapter":
                if rest:
                    self.put_on(None if rest.lower() == "none" else rest)
                there = ", ".join(self.adapters) or "none was given"
                return f"adapter: {self.adapter or 'none'} (there are: {there})"
            case "/system":
                self.form = self.form.model_copy(update={"system": rest or None})
                self.encoder.form = self.form
                return f"system: {rest or 'nothing'}"
            case "/temperature":
                self.decoding = _with(self.decoding, rest)
                return f"temperature: {self.decoding.temperature:g}"
            case "/reset":
                self.said, self.turn = [], 0
                return "what was said is forgotten"
            case "/help":
                return HELP
        known = ["/adapter", "/system", "/temperature", "/reset", "/help", "/quit"]
        raise RecipeError(f"there is no command {word}", do=nearest(word, known))


def _with(decoding: Decoding, temperature: str) -> Decoding:
    try:
        return Decoding.model_validate(decoding.model_dump() | {"temperature": float(temperature)})
    except ValueError:
        raise RecipeError(f"«{temperature}» is no temperature", do="write a number from 0, such as 0.7") from None


def named(folder: Path) -> str:
    """What an adapter is called: by its stage where its folder is one's «adapter», else by its folder.

    >>> named(Path("runs/x/sft/adapter")), named(Path("my-style"))
    ('sft', 'my-style')
    """
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def form_of(model: str) -> Format:
    """How the rows were written out that a stage of a run was trained on; of any other model the usual form."""
    folder = hub.stage_folder(model)
    if folder is None or not (folder.parent / "recipe.yaml").is_file():
        return Format()
    stages = overlay.yaml().load((folder.parent / "recipe.yaml").read_text(encoding="utf-8"))["stages"]
    stage = stages.get(folder.name.partition("@")[0], {})
    while "data" in stage:
        stage = stages.get(str(stage["data"]).partition(".")[0], {})
        if stage.get("format"):
            return Format(**stage["format"])
    return Format()


def opened(model: str, paths: Sequence[Path], **how: Any) -> Talk:
    """A conversation with a model by its name, and with adapters by their folders.

    Raises:
        ModelError: they are not there; two adapters of one name.
    """
    others: dict[str, Path] = {}
    for path in paths:
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        if not folder.is_dir():
            raise ModelError(f"there is no adapter {path}", do="give a folder with adapter_config.json, or a stage's")
        if (name := named(folder)) in others:
            raise ModelError(f"two adapters are called «{name}»", where=f"{others[name]} and {folder}", do="copy one to a folder of another name")  # fmt: skip
        others[name] = folder
    source = hub.locate(model, Path())
    for folder in others.values():
        adapters.belongs(dataclasses.replace(source, adapters=(str(folder.resolve()),)))
    return Talk(source, others=others, **how)


def converse(talk: Talk, read: Callable[[], str], write: Heard, told: Callable[[TemperError], Any]) -> None:
    """Lines in, answers out, until the lines end. An error is told, and the conversation goes on."""
    while True:
        try:
            line = read()
        except EOFError:
            return
        if not line.strip():
            continue
        if line.split()[0] == "/quit":
            return
        try:
            if line.startswith("/"):
                write(talk.command(line))
            else:
                talk.answer(line, write)
                if not talk.ended:
                    write("\n(cut: that is all that it may write)")
        except KeyboardInterrupt:
            write(" (stopped)")
        except TemperError as error:
            told(error)
            continue
        write("\n")
