"""The folders of a run's checkpoints: their names, which of them are sound, and which are deleted.

`step-00000100` is published. `.step-00000100.partial` and `.step-00000100.deleted` are what killed runs leave behind.
`step-00000100.damaged` was set aside, so that the run can do the step again; it is kept for people to look at. Whatever
has another name is somebody else's and is never touched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmtune.contract.errors import CheckpointError
from llmtune.training.manifest import Manifest, verify

_PUBLISHED = re.compile(r"step-\d{8,}")
_LEFT = re.compile(r"\.step-\d{8,}\.(partial|deleted)")
_ASIDE = re.compile(r"step-\d{8,}\.damaged(-\d+)?")


class SoundCheckpoint(NamedTuple):
    """The newest sound checkpoint of a run."""

    folder: Path
    manifest: Manifest
    damaged: Sequence[tuple[Path, str]] = ()
    """Newer ones that are not sound, each with what is wrong with it."""


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is published; the name sorts as the number does."""
    return root / f"step-{step:08d}"


def published(root: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    return sorted(_named(root, _PUBLISHED), key=lambda folder: int(folder.name.removeprefix("step-")))


def _named(root: Path, name: re.Pattern[str]) -> list[Path]:
    entries = root.iterdir() if root.is_dir() else ()
    return [path for path in entries if name.fullmatch(path.name) and path.is_dir()]


def newest(root: Path) -> SoundCheckpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Raises CheckpointError if there are checkpoints and none is sound: starting over silently would lose a run.
    """
    damaged = []
    for folder in reversed(published(root)):
        try:
            return SoundCheckpoint(folder, verify(folder), damaged)
        except CheckpointError as error:
            damaged.append((folder, str(error)))
    if damaged:
        reasons = "; ".join(reason for _, reason in damaged)
        raise CheckpointError(f"no checkpoint is sound: {reasons}. Restore the files, or start over with --fresh")
    return None


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the way, so that its step can be published again. Returns its new name."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 2
    while aside.exists():
        aside, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
    folder.rename(aside)
    return aside


def sweep(root: Path) -> None:
    """Delete what killed runs left half-written or half-deleted."""
    for folder in _named(root, _LEFT):
        shutil.rmtree(folder, ignore_errors=True)


def retain(root: Path, most: int | None, keep: set[Path]) -> list[Path]:
    """Delete the oldest published checkpoints beyond `most`, never one of `keep`. Returns what was deleted."""
    if most is None:
        return []
    folders = published(root)
    spare = [folder for folder in folders if folder not in keep]
    surplus = spare[: max(0, len(folders) - max(most, 1))]
    for folder in surplus:
        _delete(folder)
    return surplus


def _delete(folder: Path) -> None:
    # Renamed first, so that a kill leaves no half-deleted checkpoint under a published name.
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_all(root: Path) -> None:
    """Delete every checkpoint in `root`, sound or not, also behind a symbolic link; `root` too, if it is then empty."""
    sweep(root)
    for folder in _named(root, _PUBLISHED):
        _delete(folder)
    for folder in _named(root, _ASIDE):
        shutil.rmtree(folder, ignore_errors=True)
    if root.is_dir() and not root.is_symlink() and not any(root.iterdir()):
        root.rmdir()
