"""What only the installed packages decide, kept from one command to the next: `llmtune plugins` and `llmtune schema`
would import every plugin, a quarter of a second, to say what they said before."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from llmtune.folders import cache_root, write_durably

SETTLED_S = 10.0
"""What has changed within so many seconds may be changing still, and nothing is kept of it."""
_OF_THE_SHELL = ("PWD", "OLDPWD", "SHLVL", "_")
_METADATA = ("METADATA", "PKG-INFO", "entry_points.txt")


def remembered(name: str, make: Callable[[], tuple[str, bool]]) -> str:
    """The text that `make` gives, and whether it may be kept: it is made again where a package has been installed or
    removed, a file of an imported one has changed, or the environment."""
    place = cache_root() / "said" / f"{name}-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["state"] == _state(kept["folders"])[0]:
            return str(kept["text"])
    text, sound = make()
    folders = sorted(_imported_from())
    state, changed = _state(folders)
    if sound and time.time() - changed > SETTLED_S:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_durably(place, json.dumps({"state": state, "folders": folders, "text": text}))
    return text


def _imported_from() -> set[str]:
    """The folders of all modules but Python's own."""
    files = {
        name: vars(module).get("__file__")
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in sys.stdlib_module_names
    }
    return {os.path.dirname(os.path.abspath(file)) for file in files.values() if file}


def _state(folders: Iterable[str]) -> tuple[str, float]:
    """A hash of the environment, of the metadata of all packages and of the files in these folders; and when any of
    them last changed, in seconds."""
    env = sorted(pair for pair in os.environ.items() if pair[0] not in _OF_THE_SHELL)
    files = [*_metadata(), *(entry for folder in folders for entry in _entries(folder) if entry.is_file())]
    stats = [(entry.path, (stat := entry.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for entry in files]
    told = json.dumps([sys.version, sys.prefix, sys.path, env, sorted(stats)])
    latest = max((stamp for *_, modified, changed in stats for stamp in (modified, changed)), default=0)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest(), latest / 1e9


def _metadata() -> Iterator[os.DirEntry[str]]:
    """What says which packages there are, and what they offer."""
    for folder in sys.path:
        for entry in _entries(folder or "."):
            if entry.name.endswith((".dist-info", ".egg-info")):
                yield from (file for file in _entries(entry.path) if file.name in _METADATA)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where it is none."""
    with suppress(OSError), os.scandir(folder) as found:
        return list(found)
    return []
