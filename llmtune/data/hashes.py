"""Hashes of files and of source code, by which tokens that were kept are known to be those that are wanted."""

from __future__ import annotations

import hashlib
import json
import os
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmtune.folders import cache_root

_SETTLED_S = 2.0
"""A file changed more recently may change again within the resolution of its time stamps."""
_LARGEST_BYTES = 2**22
"""Larger files of a package are no source code, and count by their size alone."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered while the file stays as it is. The time of its last change of any kind (ctime)
    tells of an edit that kept the size and set back the time of modification. Raises OSError."""
    state = path.stat()
    known: list[str | int] = [str(path.absolute()), *_told_by(state)]
    memo = cache_root() / "hashes" / hashlib.sha256(str(known[0]).encode()).hexdigest()[:32]
    try:
        noted = json.loads(memo.read_text("utf-8"))
        if noted[:-1] == known:
            return noted[-1]
    except (OSError, ValueError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED_S:
        _note(memo, [*known, found])
    return found


def file_state(path: Path) -> list[int] | None:
    """What tells, without reading it, that a file is no longer what it was; None where there is none."""
    try:
        return _told_by(path.stat())
    except OSError:
        return None


def _told_by(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _note(memo: Path, what: list[object]) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        new = memo.with_name(f"{memo.name}.{os.getpid()}")
        new.write_text(json.dumps(what), "utf-8")
        new.replace(memo)
    except OSError:
        pass  # only a later start is slower for it


@cache
def code_hash(module: str) -> str:
    """SHA-256 of the files of the package that a module is in, or of the module's own file; empty where there are none.
    Taken once a process, as its code is loaded once."""
    root = module
    while (above := root.rpartition(".")[0]) and _file_of(above):
        root = above  # up to the package that is not a mere namespace
    file = _file_of(root)
    if file is None:
        return ""
    return folder_hash(file.parent) if file.name == "__init__.py" else hashlib.sha256(file.read_bytes()).hexdigest()


def _file_of(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # as of `__main__`, and of modules that were made by hand
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def folder_hash(folder: Path) -> str:
    """SHA-256 of the files in a folder and below it, and of their names, less what Python compiled."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            size = path.stat().st_size
            content = path.read_bytes() if size <= _LARGEST_BYTES else b""
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode() + content)
    return digest.hexdigest()


@cache
def own_code_hash() -> str:
    """SHA-256 of the code with which llmtune makes tokens of data."""
    rooms = Path(__file__).parent.parent
    return " ".join(folder_hash(rooms / name) for name in ("data", "media"))
