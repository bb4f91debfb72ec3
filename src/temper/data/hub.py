"""Data sets of the Hugging Face hub, and what can go wrong on the way to them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from temper.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def load(name: str, *, config: str | None, split: str | None, revision: str | None) -> tuple[Dataset, str | None]:
    """The rows of one split and the revision (commit) they come from.

    Without `split`: train, or the only split there is.

    Raises:
        DataError: out of reach, gated, made by a script, or without such a config or split.
    """
    import datasets  # takes seconds
    from datasets.exceptions import DatasetsError

    try:
        builder = datasets.load_dataset_builder(name, name=config, revision=revision)
        builder.download_and_prepare()
        data: Any = builder.as_dataset(split=_chosen(name, list(builder.info.splits or {}), split))
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise explain(error, name, config=config, split=split) from error
    return data, builder.hash


def parquet(name: str, *, config: str | None, split: str | None, revision: str | None) -> tuple[list[tuple[str, Any]], str | None]:  # fmt: skip
    """The parquet files of one split, each with what opens it where it lies (nothing is downloaded before it is read), and
    the commit.

    Raises:
        DataError: as `load`; the split is not kept as parquet.
    """
    import datasets
    from datasets.exceptions import DatasetsError
    from fsspec.core import url_to_fs

    try:
        builder = datasets.load_dataset_builder(name, name=config, revision=revision)
        known: Any = builder.config.data_files or {}
        split = _chosen(name, list(map(str, known)), split)
        if split not in known:
            raise DataError(f"«{name}» has no split «{split}»: {', '.join(map(str, known))}", do="name one: split: …")
        addresses = [str(address) for address in known[split]]
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise explain(error, name, config=config, split=split) from error
    if other := next((a for a in addresses if not a.endswith(".parquet")), None):
        raise DataError(
            f"a stream reads parquet, and «{name}» is kept otherwise", where=other,
            do="take the hub's parquet conversion: revision: refs/convert/parquet; or take stream out",
        )  # fmt: skip
    places = [(address.rpartition("/")[2], url_to_fs(address)) for address in addresses]
    return [(file, functools.partial(system.open, path, "rb")) for file, (system, path) in places], builder.hash


def _chosen(name: str, known: list[str], split: str | None) -> str:
    """The split that is asked for; of none train, or the only one there is."""
    if split is None:
        split = "train" if "train" in known else known[0] if len(known) == 1 else None
    if split is None:
        raise DataError(f"«{name}» has several splits: {', '.join(known)}", do="name one: split: …")
    return split


def explain(error: Exception, name: str, *, config: str | None = None, split: str | None = None) -> DataError:
    """What the library's error means for a user. The library tells them apart by their texts alone."""
    text = " ".join(str(error).split())
    if "gated" in text:
        return DataError(
            f"«{name}» is gated: its owner wants to know who takes it",
            do=f"accept the terms at https://huggingface.co/datasets/{name}, make a token at "
            "https://huggingface.co/settings/tokens and set HF_TOKEN to it",
        )
    if "scripts are no longer supported" in text:
        return DataError(
            f"«{name}» is made by a loading script, which datasets 4 and later do not run",
            do="take the hub's parquet conversion: revision: refs/convert/parquet",
        )
    if "BuilderConfig" in text or "Config name is missing" in text or "pick one among" in text:
        what = f"has no config «{config}»" if config else "needs a config"
        return DataError(f"«{name}» {what}", where=text, do="set config: to one of those named above")
    if "nknown split" in text:
        return DataError(f"«{name}» has no split «{split}»", where=text, do="set split: to one of those named above")
    if isinstance(error, ConnectionError) or "offline" in text.lower():
        return DataError(
            f"the data set «{name}» cannot be reached on the Hugging Face hub",
            where=text,
            do="check the network; a local file or folder works too (write ./ before its name)",
        )
    if "doesn't exist on the Hub" in text:
        return DataError(
            f"there is no data set «{name}» on the Hugging Face hub, or it is private, and no such local folder",
            do="check the name; a private one needs HF_TOKEN; a local path is taken from the recipe's folder",
        )
    return DataError(f"«{name}» cannot be loaded: {type(error).__name__}", where=text)
