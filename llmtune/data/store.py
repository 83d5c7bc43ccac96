"""Tokenised data on disk: one file for each array, written once, mapped into memory by every process that reads it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmtune.contract.examples import MEDIA_KINDS
from llmtune.data.hashes import file_hash, file_state
from llmtune.data.piece import Packed
from llmtune.data.report import Losses, SourceReport
from llmtune.data.tokens import CONTENT, TokenSamples

TYPES = {
    "ids": np.int32, "mask": np.bool_, "weights": np.float32, "starts": np.int64, "stops": np.int64,
    "trained": np.int64, "labels": np.bool_, "rows": np.int64, "columns": np.uint8, "column_stops": np.int64,
    "column_hashes": np.uint64, "media": np.int32, "sets": np.int32, "files": np.int32, "numbers": np.int64,
}  # fmt: skip
"""Arrays of `TokenSamples`; `files` and `numbers` say for each row where it stands."""

_OPTIONAL = ("weights", "labels", "columns", "column_stops", "column_hashes", "media")
"""What not all samples have."""
ABOUT = "about.json"
BAD_ROWS = "bad_rows.jsonl"


@dataclass(kw_only=True)
class Tokenised:
    """What a store holds."""

    samples: TokenSamples
    sources: list[SourceReport]
    losses: Losses
    ends: Counter[int]
    bad_rows: Path
    """JSON Lines of the rows that could not be used: `origin`, `reason`, `detail`, `row`."""


@dataclass(kw_only=True)
class StoreWriter:
    """Appends pieces to a new store."""

    folder: Path
    facts: Mapping[str, Any]
    """Everything the content depends on."""
    made_by: str = ""
    tokens: int = 0
    kept_rows: int = 0
    samples: int = 0
    width: int | None = None
    kind: str = "conversation"
    origins: list[str] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    ends: Counter[int] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    blamed: dict[str, list[int] | None] = field(default_factory=dict)
    """Files for which rows could not be used, each as it was."""
    _files: dict[str, BinaryIO] = field(default_factory=dict)
    _hashes: dict[str, Any] = field(default_factory=dict)

    def add(self, piece: Packed, number: int) -> None:
        """Append the samples of a piece of data set `number`, and the rows that could not be used."""
        if not self.origins or self.origins[-1] != piece.origin:
            self.origins.append(piece.origin)
        if piece.weights is not None and "weights" not in self._files:
            self._fill_weights()
        starts = np.cumsum(piece.lengths) - piece.lengths + self.tokens
        self._write("ids", piece.ids)
        self._write("mask", piece.mask)
        if "weights" in self._files:
            self._write("weights", np.ones(len(piece.ids)) if piece.weights is None else piece.weights)
        self._write("starts", starts)
        self._write("stops", starts + piece.lengths)
        self._write("trained", piece.trained)
        self._write("rows", piece.rows + self.kept_rows)
        self._write("sets", np.full(len(piece.rows), number))
        self._write("files", np.full(len(piece.numbers), len(self.origins) - 1))
        self._write("numbers", piece.numbers)
        if piece.labels is not None:
            self._write("labels", piece.labels)
        if (columns := piece.columns) is not None:
            columns = columns._replace(column_stops=columns.column_stops + self.written["columns"])
            for name, values in columns._asdict().items():
                self._write(name, values.reshape(-1))
        if len(piece.rows):
            self.width = piece.width
        self.tokens += len(piece.ids)
        self.kept_rows += len(piece.numbers)
        self.samples += len(piece.rows)
        self.losses += piece.losses
        self.ends += piece.ends
        for bad in piece.bad:
            self._file("bad_rows", BAD_ROWS).write(bad.json_line())
            self.blamed |= {path: file_state(Path(path)) for path in bad.paths}

    def finish(self, sources: Sequence[SourceReport], names: Sequence[str]) -> None:
        """Close the arrays and say what they are."""
        for file in self._files.values():
            file.close()
        digest = hashlib.sha256(
            "".join(
                f"{name}{self._hashes[name].hexdigest()}" for name in sorted(CONTENT) if name in self._hashes
            ).encode()
        )
        about = {
            "arrays": dict(self.written), "width": self.width or 1, "kind": self.kind, "set_names": list(names),
            "origins": self.origins, "digest": digest.hexdigest(), "losses": vars(self.losses),
            "ends": {str(token): count for token, count in self.ends.items()},
            "sources": [vars(source) for source in sources], "facts": self.facts, "made_by": self.made_by,
            "blamed": self.blamed,
            "hashes": {name: found.hexdigest() for name, found in self._hashes.items()},
        }  # fmt: skip
        (self.folder / ABOUT).write_text(json.dumps(about), "utf-8")

    def _fill_weights(self) -> None:
        """Everything before the first weighted piece counts 1."""
        for start in range(0, self.tokens, 2**22):
            self._write("weights", np.ones(min(2**22, self.tokens - start)))
        self._write("weights", np.ones(0))

    def _write(self, name: str, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, dtype=TYPES[name]).data
        self._file(name, f"{name}.bin").write(raw)
        self.written[name] += len(values)
        self._hashes.setdefault(name, hashlib.sha256()).update(raw)

    def _file(self, name: str, spelling: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / spelling).open("wb")
        return self._files[name]


def read_about(folder: Path) -> dict[str, Any] | None:
    """What a finished store says of itself; None where there is none, or something else."""
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return about if isinstance(about, dict) and {"facts", "arrays"} <= set(about) else None


def foreign_files(folder: Path) -> list[str]:
    """Names of what lies in a folder and is not part of a store, all of it where there is no store."""
    ours = {ABOUT, BAD_ROWS, *(f"{name}.bin" for name in TYPES)} if read_about(folder) else set()
    return sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []


def open_store(folder: Path, checked: bool = False) -> Tokenised:
    """Map a finished store. Unless it was `checked`, its files are read once and compared with what was written; a file
    that is as it was then is not read again.

    Raises:
        ValueError: it is damaged.
    """
    about = read_about(folder)
    if about is None:
        raise ValueError(f"{folder} holds no {ABOUT}")
    empty = {name: np.zeros(0, TYPES[name]) for name in TYPES if name not in _OPTIONAL}
    mapped = {name: _mapped(folder / f"{name}.bin", name, count) for name, count in about["arrays"].items()}
    for name, written in {} if checked else about.get("hashes", {}).items():
        if file_hash(folder / f"{name}.bin") != written:
            raise ValueError(f"{folder / f'{name}.bin'} is not as it was written")
    arrays: dict[str, Any] = empty | mapped
    files, numbers, origins = arrays.pop("files"), arrays.pop("numbers"), about["origins"]
    for name, width in (("column_stops", 2), ("media", len(MEDIA_KINDS))):
        if name in arrays:
            arrays[name] = arrays[name].reshape(-1, width)
    samples = TokenSamples(
        **arrays,
        set_names=tuple(about["set_names"]),
        width=about["width"],
        kind=about["kind"],
        place=lambda row: f"{origins[files[row]]}{numbers[row]}",
        digest=about["digest"],
    )
    return Tokenised(
        samples=samples,
        sources=[SourceReport.restored(source) for source in about["sources"]],
        losses=Losses(**about["losses"]),
        ends=Counter({int(token): count for token, count in about["ends"].items()}),
        bad_rows=folder / BAD_ROWS,
    )


def _mapped(path: Path, name: str, count: int) -> np.ndarray:
    kind = np.dtype(TYPES[name])
    if path.stat().st_size != count * kind.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, {count * kind.itemsize:,} were written")
    return np.memmap(path, kind, "r", shape=(count,)) if count else np.zeros(0, kind)
