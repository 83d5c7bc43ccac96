"""What a checkpoint says of itself, and whether it is still what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtune.contract.errors import CheckpointError
from llmtune.folders import size_and_hash, write_durably

SCHEMA = 2
WITHOUT_HASH = 1
"""Manifests of this older form have no hash of their own; they are still read."""
FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of one checkpoint. The file holds a SHA-256 of them beside them."""

    step: int
    ranks: int
    recipe: Mapping[str, Any]
    """The resolved recipe, to compare on resume."""
    plugins: Mapping[str, Any]
    llmtune: str
    rows: int = 0
    """Rows (packs, with packing) of an optimiser step over all ranks; the run keeps it on any number of ranks."""
    data: str = ""
    """Hash of the tokenised training data."""
    revision: str | None = None
    """The base model's commit on the hub."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """What else the result depends on, by name, as hashes: see `llmtune.training.origins`."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Plain values the run continues with: counters, loss scale, optimiser scalars."""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Path to (bytes, SHA-256)."""
    schema: int = SCHEMA


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with its own hash, flushed to disk."""
    content = asdict(manifest)
    write_durably(folder / FILE, json.dumps(content | {"sha256": _hash(content)}, indent=1))


def _hash(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # tuples as lists: as they are when read back
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Parse `manifest.json`. Raises CheckpointError for one that is missing, unreadable, or not as it was written."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint of llmtune, manifest.json cannot be read ({error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no mapping; the file is damaged, or another program's")
    said = content.pop("sha256", None)
    if said is not None and said != _hash(content):
        raise CheckpointError(f"{path}: its content does not match its own SHA-256; the file is damaged or was edited")
    if content.get("schema") != (SCHEMA if said is not None else WITHOUT_HASH):
        raise CheckpointError(
            f"{folder}: made by another llmtune (format {content.get('schema')}, this one reads {SCHEMA})"
        )
    try:
        return Manifest(**content)
    except TypeError as error:
        raise CheckpointError(f"{path}: has other entries than a manifest ({error}); the file is damaged") from error


def verify(folder: Path) -> Manifest:
    """Check every file against the manifest's size and hash. Raises CheckpointError naming the file."""
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the manifest lists it")
        found, content = size_and_hash(path)
        if found != size:
            raise CheckpointError(f"{path}: {found} bytes, the manifest says {size}; the file is damaged")
        if content != digest:
            raise CheckpointError(f"{path}: its content does not match the manifest's SHA-256; the file is damaged")
    return manifest
