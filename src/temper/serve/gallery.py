"""What is served: names, the models and adapters behind them, and how each is asked.

Adapters of one base share it; plain LoRAs are decoded together with it and with one another, others get a copy of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import chat, hub
from temper.data.chat import Encoder
from temper.errors import ModelError, RecipeError, TemperError, nearest
from temper.models import adapted, adapters, load, rowwise
from temper.serve.engine import Engine, Lane

NAME_LIMIT = 200  # characters of a model's name


@dataclasses.dataclass
class Served:
    """A model under one name.

    `key` is what its lane calls its adapter; None where all rows of the lane have the same model.
    """

    name: str
    source: hub.Source
    lane: Lane
    encoder: Encoder
    ends: frozenset[int]
    context: int | None
    key: str | None = None
    parent: str | None = None
    loaded: bool = False  # by a request, not at the start
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def apart(self) -> bool:
        """Whether prompt and answer each have a context of their own."""
        return self.encoder.apart

    def room(self, prompt: int) -> int | None:
        """New tokens for which there is room after a prompt of so many; None: nothing limits it."""
        if self.context is None:
            return None
        return (self.context if prompt <= self.context else 0) if self.apart else self.context - prompt


class Gallery:
    """All that is served.

    Args:
        folders: adapters that requests may load lie within these, and weights.
        reloads: requests may have a base's weights read anew.
        slots: answers decoded together, per base.
    """

    def __init__(self, engine: Engine, *, folders: Sequence[Path] = (), reloads: bool = False, slots: int = 32) -> None:
        self.engine, self.slots, self.reloads = engine, slots, reloads
        self.folders = [folder.resolve() for folder in folders]
        self.served: dict[str, Served] = {}
        self.notices: list[str] = []
        self._bases: dict[tuple[str, str | None, str | None], tuple[Any, Lane]] = {}  # name, revision, held
        self._numbers = 0
        self._changing = threading.Lock()  # names are added and taken away by one at a time

    def __getitem__(self, name: str) -> Served:
        """
        Raises:
            ModelError: no such name; says which there are.
        """
        if name not in self.served:
            raise ModelError(f"there is no model «{name}» here", do=nearest(name, self.served))
        return self.served[name]

    def open(self, models: Sequence[str], others: Mapping[str, Path]) -> None:
        """Load what is served from the start.

        Args:
            models: each a stage's folder, a model's or a hub id, or NAME=one of these. A base of which only an adapter is
                named is served too, under its own name.
            others: adapters by name, each of a base that is served.

        Raises:
            TemperError: one cannot be loaded; two of one name.
        """
        for model in models:
            name, _, path = model.rpartition("=") if not Path(model).exists() else ("", "", model)
            source = hub.locate(path, Path())
            if source.endpoint:
                raise ModelError(f"{path} is an endpoint already", do="name a model of this machine")
            self._serve(name or _called(source), source, model=path)
        for served in list(self.served.values()):
            base = dataclasses.replace(served.source, adapters=())
            if served.key is not None and not any(s.source == base for s in self.served.values()):
                self._bare(served, base)
        for name, path in others.items():
            folder = path / "adapter" if (path / "adapter").is_dir() else path
            if not folder.is_dir():
                raise ModelError(f"there is no adapter {path}", do="give a folder with adapter_config.json, or a stage's")
            with _reading(path):
                self._serve(name, self._on_ours(folder.resolve()), model=str(path))

    def _bare(self, served: Served, base: hub.Source) -> None:
        """Serve the base of an adapter, as the adapter knows it."""
        name = next(n for n in (_called(base), base.name) if n not in self.served)
        held = adapters.held(served.source)
        if held:
            self.notices.append(f"«{name}» is the base as «{served.name}» was trained on it, in {held}")
        self.served[name] = dataclasses.replace(served, name=name, source=base, key=None, parent=None)
        served.parent = name

    def _on_ours(self, folder: Path) -> hub.Source:
        """An adapter on that base of ours on which it was trained.

        Raises:
            ModelError: it was trained on none of them.
        """
        bases = list(dict.fromkeys(dataclasses.replace(s.source, adapters=()) for s in self.served.values()))
        failed: ModelError | None = None
        for base in bases:
            source = dataclasses.replace(base, adapters=(str(folder),))
            try:
                adapters.belongs(source)
                return source
            except ModelError as error:
                failed = failed or error
        noted = hub.locate(str(folder), Path())  # an adapter on top of another one
        if len(noted.adapters) > 1 and dataclasses.replace(noted, adapters=()) in bases:
            return noted
        assert failed is not None
        raise failed

    def _serve(self, name: str, source: hub.Source, *, model: str, copies: bool = True) -> Served:
        """Add a model under a name; what is loaded is loaded on the computing thread."""
        if name in self.served:
            raise RecipeError(f"two models are called «{name}»", do="name them: NAME=PATH")
        found: Served = self.engine.call(lambda: self._opened(name, source, model, copies)).result()
        self.served[name] = found
        return found

    def _opened(self, name: str, source: hub.Source, model: str, copies: bool) -> Served:
        base, known = dataclasses.replace(source, adapters=()), (source.name, source.revision, adapters.held(source))
        hf: Any = None
        lane: Lane | None = None
        key: str | None = None
        factors: rowwise.Factors | None = None
        if not source.adapters or (rowwise.plain(source) and (copies or known in self._bases)):
            if known not in self._bases:
                hf, notices = adapters.open_base(source, device=self.engine.device)
                self.notices += notices
                if any(known[:2] == other[:2] for other in self._bases):
                    self.notices.append(f"«{name}» has its base in {known[2] or 'full'}, which is held beside the other form of it")
                self._bases[known] = hf, self._lane(hf, base)
            hf, lane = self._bases[known]
        if source.adapters and lane is not None and lane.native:
            factors = rowwise.factors_of(hf, source)
            if factors is not None:
                self._numbers += 1
                key = f"{name}#{self._numbers}"
        if source.adapters and key is None:  # something else than products, or a base that `generate` decodes
            if not copies:
                raise ModelError(
                    f"the adapter «{name}» needs a copy of its base for itself",
                    do="name it at the start: --adapter NAME=PATH. Only plain LoRA adapters can be loaded later",
                )
            hf, notices = adapters.open_model(source, device=self.engine.device)
            self.notices += [*notices, f"«{name}» is decoded apart from the other models, with a copy of its base"]
            lane = self._lane(hf, source)
        assert lane is not None
        inner = adapted.inner(hf)
        apart = bool(inner.config.is_encoder_decoder)
        encoder = Encoder(load.tokenizer(source), chat.form_of(model), end_ids=load.end_ids(inner), apart=apart)
        context = load.context(inner)
        virtual = adapted.virtual(hf) if key is None else 0
        if key is not None and factors is not None:
            lane.add(key, factors)  # last, when nothing can fail any more
        return Served(
            name, source, lane, encoder, frozenset(encoder.end_ids | adapters.trained_ends(source)),
            None if context is None else context - virtual, key,
            next((s.name for s in self.served.values() if s.source == base), None) if source.adapters else None,
        )  # fmt: skip

    def _lane(self, hf: Any, source: hub.Source) -> Lane:
        tokenizer = load.tokenizer(source)
        ends = {*load.end_ids(adapted.inner(hf)), *adapters.trained_ends(source)}
        lane = Lane(hf, tokenizer, end_ids=sorted(ends), slots=self.slots)
        self.engine.lanes.append(lane)
        return lane

    def load(self, name: str, path: str) -> Served:
        """An adapter that a request asks for; it lies within the folders that were named at the start.

        Raises:
            RecipeError: the name is taken, or is none.
            ModelError: there is no such adapter; it lies elsewhere; it belongs to another base.
        """
        if not name or len(name) > NAME_LIMIT or not name.isprintable():
            raise RecipeError("that is no name for a model", do=f"give 1 to {NAME_LIMIT} printable characters")
        with self._changing:
            if name in self.served:
                raise RecipeError(f"there is a model «{name}» already", do="take another name, or unload it first")
            folder = self._within(path)
            with _reading(folder):
                found = self._serve(name, self._on_ours(folder), model=str(folder), copies=False)
            found.loaded = True
            return found

    def reload(self, path: str) -> None:
        """Read the weights of the one base that is served anew, from the folder of a model.

        Raises:
            RecipeError: more than one model is served, or answers are under way.
            ModelError: there is no such model; its weights are of other shapes; it lies elsewhere.
        """
        with self._changing:
            if len({id(s.lane) for s in self.served.values()}) > 1 or any(s.key or s.source.adapters for s in self.served.values()):
                raise RecipeError("more than one model is served here, and others belong to the weights as they are", do="serve one base alone")
            folder, (served, *_) = self._within(path, "model"), self.served.values()
            with _reading(folder):
                self.engine.call(lambda: self._reloaded(served.lane, folder)).result()

    def _reloaded(self, lane: Lane, folder: Path) -> None:
        if lane.busy:
            raise RecipeError("answers are under way, which would go on under other weights", do="try again when they are finished")
        fresh, _ = adapters.open_base(hub.Source(str(folder)), device=self.engine.device)
        theirs = dict(fresh.named_parameters())

        def change() -> None:
            mine = dict(lane.model.named_parameters())
            if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
                raise ModelError(f"{folder} holds a model of other shapes than the one that is served", do="serve its own base")
            for name, parameter in mine.items():
                parameter.data.copy_(theirs[name].data)

        lane.renew(change)

    def _within(self, path: str, what: str = "adapter") -> Path:
        """The folder of an adapter or a model, links followed, if it lies within one of ours."""
        if "\0" in path or not path.strip():
            raise ModelError("that is no path", do=f"give the folder of the {what}")
        if not self.folders:
            raise ModelError(f"this server loads no {what}s", do="start it with --adapters-from FOLDER")
        for root, given in itertools.product(self.folders, (path, Path.cwd() / path)):
            folder = Path(os.path.realpath(root / given))
            if folder.is_relative_to(root):
                folder = Path(os.path.realpath(folder / "adapter")) if (folder / "adapter").is_dir() else folder
                files = [*folder.rglob("*")] if folder.is_dir() and folder.is_relative_to(root) else []
                if files and all(Path(os.path.realpath(file)).is_relative_to(root) for file in files):
                    return folder
        shown = ", ".join(str(root) for root in self.folders)
        raise ModelError(f"there is no {what} {path} in the folders that may be loaded from", do=f"give a path within {shown}")

    def unload(self, name: str) -> None:
        """Serve a name no more; answers under way are finished.

        Raises:
            ModelError: no such name.
            RecipeError: it was served from the start.
        """
        with self._changing:
            served = self[name]
            if not served.loaded:
                raise RecipeError(f"«{name}» was not loaded by a request", do="only such adapters can be unloaded")
            del self.served[name]

        def leave() -> None:
            if served.key is not None:
                served.lane.remove(served.key)
            elif served.lane in self.engine.lanes and not served.lane.busy:
                self.engine.lanes.remove(served.lane)
                served.lane.close()

        self.engine.call(leave).result()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within, whatever a damaged or foreign adapter makes its readers raise is said as one error."""
    try:
        yield
    except TemperError:
        raise
    except Exception as error:
        raise ModelError(
            f"what lies in {path} cannot be read: {type(error).__name__}: {str(error)[:200]}", do="is it whole, and in the format of PEFT or transformers?"
        ) from error


def _called(source: hub.Source) -> str:
    """A model's name where it is given none: its stage's, its folder's, or its id at the hub.

    >>> _called(hub.Source("Qwen/Qwen2.5-0.5B")), _called(hub.Source("/", None, ("runs/x/sft/adapter",)))
    ('Qwen/Qwen2.5-0.5B', 'sft')
    """
    if source.adapters:
        return chat.named(Path(source.adapters[-1]))
    if not source.local:
        return source.name
    folder = Path(source.name)
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name
