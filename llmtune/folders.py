"""Where llmtune keeps what it can make again, and how a file is written so that a power cut cannot empty it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def cache_root() -> Path:
    """`LLMTUNE_CACHE`, or `~/.cache/llmtune`."""
    return Path(os.environ.get("LLMTUNE_CACHE") or Path.home() / ".cache" / "llmtune")


def write_durably(path: Path, text: str) -> None:
    """Write a small file in one step: readers, and a machine that loses power, have the former or the new content."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def publish(partial: Path, final: Path) -> None:
    """Flush a file, or a folder with all its files, to disk, then give it its final name, in place of a former one.

    The files can be read by whom the user lets read files.
    """
    make_readable(partial)
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir():
            sync_folder(path)
        else:
            flush(path)
    if final.is_dir() and not final.is_symlink():  # the system replaces files and links, but no folders
        former = final.with_name(f".{final.name}.former")
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
        partial.rename(final)
        shutil.rmtree(former, ignore_errors=True)
    else:
        final.unlink(missing_ok=True)
        partial.rename(final)
    sync_folder(final.parent)


def flush(file: Path) -> None:
    """Have a file's content on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def make_readable(path: Path) -> None:
    """Give a file, or all files of a folder, the mode of new files: safetensors makes them for the user alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    for file in [path, *path.rglob("*")]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_and_hash(path: Path) -> tuple[int, str]:
    """A file's bytes and the SHA-256 of its content."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
