"""What a data set's spelling means: files, a set that ships with llmtune, or a data set on the hub."""

from __future__ import annotations

import glob
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, did_you_mean, listed
from llmtune.data.reading.files import COMPRESSED, KINDS, kind_of

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that lie beside data and describe them."""

_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z])", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(spelling: str, base_dir: Path, split: str = "train") -> list[Path] | str:
    """The files that a data set's path names, in a fixed order, or the id of a hub data set.

    A path that exists is local; so is one that starts with `/`, `./`, `../` or `~`, ends like a data file, or holds
    `*`, `?` or `[`. Relative paths count from `base_dir`. `split` chooses among those of a folder that the `datasets`
    library saved.
    """
    spelling = spelling.strip()
    if spelling.startswith("hub:"):
        return _hub_id(spelling.removeprefix("hub:"))
    if spelling.startswith("llmtune:"):
        return [_shipped(spelling.removeprefix("llmtune:"))]
    path = base_dir / Path(spelling).expanduser()
    if path.is_dir():
        return _in_folder(spelling, path, split)
    if path.exists():
        return [_readable(path)]
    if any(sign in spelling for sign in "*?["):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise DataError(f"{spelling}: no file matches {path}; check the pattern and the folder it counts from")
        return [_readable(file) for file in files]
    if spelling.startswith(("/", "./", "../", "~")) or kind_of(Path(spelling)) or spelling.count("/") > 1:
        raise DataError(f"{spelling}: read as a local path, but {path} does not exist.{_near(path)}")
    return _hub_id(spelling)


def _in_folder(spelling: str, folder: Path, split: str) -> list[Path]:
    """Data files in a folder and its subfolders; text files only where there is nothing else, as notes lie about."""
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json", "splits")
        if split not in splits:
            raise DataError(f'{spelling}: holds no split "{split}", allowed are {listed(splits)}; set `split`')
        folder = folder / split
    if (folder / "state.json").is_file():  # other files there are the library's own caches
        return [folder / each["filename"] for each in _described(folder / "state.json", "_data_files")]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _DESCRIPTIONS)
    hidden = [file for file in files if any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in files if kind_of(file) and file not in set(hidden)]
    if not files:
        raise DataError(f"{spelling}: the folder {folder} holds no file ending in {listed(KINDS, 12)}")
    files = [file for file in files if kind_of(file) != "text"] or files
    _refuse_several_splits(spelling, folder, files)
    return files


def _described(file: Path, key: str) -> list[Any]:
    try:
        return json.loads(file.read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not what the datasets library saves ({error!r}); save the data set again") from None


def _refuse_several_splits(spelling: str, folder: Path, files: list[Path]) -> None:
    """DataError if names tell that some files are meant to train on and others to test with."""
    splits: dict[str, Path] = {}
    for file in files:
        for part in file.relative_to(folder).parts:
            if split := _SPLIT.match(part):
                splits.setdefault(split[1].lower(), file)
    if "train" in splits and len(splits) > 1:
        names = listed(file.relative_to(folder) for file in splits.values())
        raise DataError(
            f"{spelling}: the folder holds several splits ({names}); name the one to read, as in {spelling}/train*"
        )


def _hub_id(name: str) -> str:
    if not _HUB_ID.fullmatch(name):
        raise DataError(f"hub:{name}: not the id of a hub data set, which looks like hub:owner/name")
    return name


def _shipped(name: str) -> Path:
    folder = Path(str(resources.files("llmtune") / "data" / "sets"))
    known = sorted(file.stem for file in folder.glob("*.jsonl"))
    if name not in known:
        near = did_you_mean(name, known)
        raise DataError(f"llmtune:{name}: no such set ships with llmtune.{near} Known: {listed(known)}")
    return folder / f"{name}.jsonl"


def _readable(path: Path) -> Path:
    if kind_of(path) is None:
        ending = path.suffix or "nothing"
        allowed = f"{listed(KINDS, 12)}, each also with {listed(COMPRESSED)}"
        raise DataError(f"{path}: cannot read files ending in {ending}, allowed are {allowed}")
    return path


def _near(path: Path) -> str:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names) or " Check the path, or write hub:owner/name for a data set on the hub"
