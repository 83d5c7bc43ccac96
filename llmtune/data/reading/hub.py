"""Data sets on a hub, through the `datasets` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError, LoadError
from llmtune.contract.hubs import Repository
from llmtune.data.reading.files import kind_of
from llmtune.data.reading.rows import Row
from llmtune.data.reading.tables import without_nulls
from llmtune.model.hub import Download

if TYPE_CHECKING:
    from llmtune.data.reading.dataset import Dataset


def hub_rows(dataset: Dataset, before: int, *, streaming: bool = False) -> Iterator[Row]:
    """Rows of a hub data set after the first `before`, downloaded whole, or as they come where `streaming`."""
    table: Any = load(dataset, streaming)
    for number, data in enumerate(_undecoded(table.skip(before) if before else table), start=before + 1):
        yield Row(without_nulls(data), number)


def _undecoded(table: Any) -> Iterator[Any]:
    """Rows in which pictures, sounds and videos are what their files hold: opened ones would have to be written anew,
    and to open a sound takes a package."""
    features = getattr(table, "features", None)  # unknown of some streams
    if not any(map(_shows, (features or {}).values())):
        yield from table
    else:
        lazy = table.to_iterable_dataset() if hasattr(table, "to_iterable_dataset") else table
        yield from map(_with_bytes, lazy.decode(False))


def _shows(feature: Any) -> bool:
    """Whether a column, or a part of it, has to be opened."""
    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return hasattr(feature, "decode_example") or any(map(_shows, filter(None, inner)))


def _with_bytes(value: Any) -> Any:
    """The value, in which files that the library has only named (`{bytes: null, path: ...}`) are read, in its own
    folders or from the hub. Others are left to who opens what rows name."""
    import fsspec

    if isinstance(value, list):
        return [_with_bytes(part) for part in value]
    if not isinstance(value, dict):
        return value
    path = value["path"] if value.keys() == {"bytes", "path"} and value["bytes"] is None else None
    if path is None or not (Path(path).is_absolute() or "hf://" in path):
        return {key: _with_bytes(part) for key, part in value.items()}
    opened: Any = fsspec.open(path, "rb")
    with suppress(OSError), opened as file:
        return {**value, "bytes": file.read()}
    return value


def hub_content(dataset: Dataset) -> str:
    """What tells this data set's content from another's: the library's own fingerprint, else a hash of all rows."""
    table = load(dataset)
    # Of files that were fetched here it tells when that was, too.
    known = getattr(table, "_fingerprint", None) if dataset.access.hub.read_by_datasets else None
    if known:
        return str(known)
    digest = hashlib.sha256()
    for row in _undecoded(table):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def load(dataset: Dataset, streaming: bool = False) -> Any:
    """The data set itself, loaded once. DataError with what to do about it."""
    told = f'"{dataset.spelling}" is no local path, so it was read as the hub data set {dataset.hub}'
    if dataset.spelling.startswith("hub:") or dataset.spelling != dataset.hub:
        told = f"hub data set {dataset.hub}"
    try:
        import datasets
    except ImportError:
        raise DataError(f"{told}, which needs the datasets library; run `pip install datasets`") from None
    access = dataset.access
    more: dict[str, Any] = {"streaming": True} if streaming else {}
    more |= {"data_dir": dataset.folder} if dataset.folder else {}
    more |= {"cache_dir": access.cache_dir} if access.cache_dir else {}
    try:
        if access.hub.read_by_datasets:
            more |= {"token": access.token} if access.token else {}
            return _loaded(datasets, dataset.hub, dataset.subset, dataset.split, **more)
        return _loaded(datasets, str(_fetched(dataset)), dataset.subset, dataset.split, **more)
    except LoadError as error:
        raise DataError(f"{told}: {error}") from error
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{told}, which could not be loaded: {text}. Check the id, split and subset, the network and "
            "HF_HUB_OFFLINE, or name a local file"
        ) from error


def _fetched(dataset: Dataset) -> Path:
    """The folder with the data set's files, of a hub that the `datasets` library does not know. Raises LoadError."""
    access = dataset.access
    assert dataset.hub is not None
    within = f"{dataset.folder.strip('/')}/" if dataset.folder else ""

    def readable(names: list[str]) -> list[str]:
        found = [name for name in names if name.startswith(within) and kind_of(Path(name)) is not None]
        if not found:
            raise LoadError(f"dataset: {dataset.hub} on {access.hub.title} holds no file of data; name another")
        return [*found, *(name for name in names if name == "README.md")]  # which describes subsets and splits

    def lacking(folder: Path) -> list[str]:
        there = [path for path in folder.rglob("*") if kind_of(path) is not None]
        return [] if there else ["files of data"]

    repository = Repository(name=dataset.hub, kind="dataset", cache_dir=access.cache_dir, token=access.token)
    return Download(repository, access.hub, "dataset").run(readable, lacking)[0]


@lru_cache(maxsize=8)
def _loaded(datasets: Any, name: str, subset: str | None, split: str, **more: Any) -> Any:
    return datasets.load_dataset(name, subset, split=split, **more)
