"""What a data set's spelling means: files, a set that ships with llmtune, or a data set on the hub."""

from __future__ import annotations

import glob
import re
from importlib import resources
from pathlib import Path

from llmtune.data.reading.files import COMPRESSED, KINDS, kind_of
from llmtune.errors import DataError, did_you_mean, listed

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that lie beside data and describe them."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(spelling: str, base_dir: Path) -> list[Path] | str:
    """The files that a data set's path names, in a fixed order, or the id of a hub data set.

    A path that exists is local; so is one that starts with `/`, `./`, `../` or `~`, ends like a data file, or holds
    `*`, `?` or `[`. Relative paths count from `base_dir`.
    """
    spelling = spelling.strip()
    if spelling.startswith("hub:"):
        return _hub_id(spelling.removeprefix("hub:"))
    if spelling.startswith("llmtune:"):
        return [_shipped(spelling.removeprefix("llmtune:"))]
    path = base_dir / Path(spelling).expanduser()
    if path.is_dir():
        return _in_folder(spelling, path)
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


def _in_folder(spelling: str, folder: Path) -> list[Path]:
    """Data files in a folder and its subfolders; text files only where there is nothing else, as notes lie about."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _DESCRIPTIONS)
    files = [file for file in files if kind_of(file) and not file.name.startswith(".")]
    if not files:
        raise DataError(f"{spelling}: the folder {folder} holds no file ending in {listed(KINDS, 12)}")
    return [file for file in files if kind_of(file) != "text"] or files


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
