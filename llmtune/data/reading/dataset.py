"""What a recipe's spelling of a data set stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError
from llmtune.contract.hubs import Hub
from llmtune.data.config import Source
from llmtune.data.reading.locate import locate
from llmtune.data.reading.registry import described
from llmtune.model.huggingface import HuggingFace


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How data sets of the hub are fetched; the keys `cache_dir`, `token` and `hub_config` of a recipe."""

    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    hub: Hub = field(default_factory=HuggingFace)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set: where its rows are, and what is known of them before one is read."""

    spelling: str
    """As the recipe names it."""
    name: str
    """What reports and metrics call it."""
    files: tuple[Path, ...] = ()
    """In the order in which they are read; empty for a hub data set."""
    hub: str | None = None
    split: str = "train"
    subset: str | None = None
    folder: str | None = None
    """Folder inside a hub data set."""
    format: str | Mapping[str, Any] | None = None
    """Name of the format, or its block; None leaves it to the recipe's `data_config`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The format's columns and what they are called here."""
    exclusive: bool = False
    """Whether columns that `columns` does not name are as if they were not there."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Keys and roles of messages, where they differ from the format's."""
    ranking: bool = False
    """Whether a registry says that rows are preferences."""
    num_samples: int | None = None
    access: HubAccess = field(default_factory=HubAccess)


def find(
    source: Source, base_dir: Path, dataset_dir: Path | str | None = None, access: HubAccess | None = None
) -> Dataset:
    """Look `source` up: in `dataset_info.json`, among the files, else on the hub.

    A name that `dataset_info.json` holds is taken from there. What the recipe's own entry says wins over it.

    Raises:
        DataError: nothing is there, or it cannot be used; with the nearest name.
    """
    spelling = source.path.strip()
    access = access or HubAccess()
    entry = described(spelling, base_dir, dataset_dir, access.hub.registry_key)
    if entry is None:
        where, base = spelling, base_dir
    else:
        where, base = entry.path, entry.base_dir
    known: dict[str, Any] = dict(entry.facts) if entry is not None else {}
    if source.format is not None:  # the registry's names of columns are those of another format
        known = {key: value for key, value in known.items() if key not in ("columns", "exclusive", "tags", "ranking")}
    own: dict[str, Any] = {
        "format": source.format, "columns": {**known.get("columns", {}), **source.columns},
        "tags": {**known.get("tags", {}), **source.tags}, "subset": source.subset, "num_samples": source.num_samples,
        "split": source.split if source.split != "train" else None,
    }  # fmt: skip
    try:
        place = locate(where, base, own["split"] or known.get("split", source.split))
    except DataError as error:
        raise (error if entry is None else DataError(f"{spelling}, of dataset_info.json in {base}: {error}")) from None
    return Dataset(
        spelling=spelling,
        name=source.name or (spelling if entry is not None else _short(spelling)),
        files=() if isinstance(place, str) else tuple(place),
        hub=place if isinstance(place, str) else None,
        access=access,
        **{**known, **{key: value for key, value in own.items() if value}},
    )


def _short(spelling: str) -> str:
    """`data/chats.jsonl.gz` is called `chats`."""
    last = spelling.rstrip("/").rsplit("/", 1)[-1].removeprefix("hub:").removeprefix("llmtune:")
    return last.split(".")[0] or last
