"""A name for the content of files, quick to find again while they stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from llmtune.contract.errors import DataError
from llmtune.data.reading.files import kind_of
from llmtune.data.reading.found import Found
from llmtune.data.reading.hub import hub_content
from llmtune.folders import cache_root

_BLOCK_BYTES = 2**22
_SETTLED_S = 2.0
"""A file changed more recently may change again within the resolution of its time stamp."""


def content_key(found: Found) -> str:
    """SHA-256 over the content of the files in their order. DataError if one cannot be read."""
    if found.hub is not None:
        return hub_content(found)
    digest = hashlib.sha256()
    for path in found.files:
        try:
            digest.update(f"{kind_of(path)} {_file_hash(path)}\n".encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from None
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    state = path.stat()
    known = [str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]
    memo = cache_root() / "hashes" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    try:
        noted = json.loads(memo.read_text("utf-8"))
        if noted[:-1] == known:
            return noted[-1]
    except (OSError, ValueError):
        pass
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if time.time() - state.st_mtime > _SETTLED_S:
        _note(memo, [*known, digest.hexdigest()])
    return digest.hexdigest()


def _note(memo: Path, what: list[object]) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        new = memo.with_name(f"{memo.name}.{os.getpid()}")
        new.write_text(json.dumps(what), "utf-8")
        new.replace(memo)
    except OSError:
        pass  # only a later start is slower for it
