"""Opening files, compressed or not, and telling what they hold."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.errors import DataError

KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".feather": "arrow", ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
"""What a file's ending says of its content."""
COMPRESSED = (".gz", ".zst")
NAMES = ", ".join(KINDS)

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def kind_of(path: Path) -> str | None:
    """What the file holds by its ending, `.gz` and `.zst` aside; None for an ending that says nothing."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return KINDS.get(name.suffix.lower())


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. DataError if they are not what the ending says."""
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
        packed = {_GZIP: ".gz", _ZSTD: ".zst"}
        found = next((suffix for magic, suffix in packed.items() if head.startswith(magic)), None)
        if head and found != (path.suffix if path.suffix in COMPRESSED else None):
            said = f"is compressed ({found})" if found else f"is not compressed, though it ends in {path.suffix}"
            fix = f"{path.name}{found}" if found else path.stem
            raise DataError(f"{path}: {said}; rename it to {fix}")
        try:
            yield file if found is None else _unpacked(file, found)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the compressed data end early or are damaged ({error}); copy it again") from None


def _unpacked(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    import pyarrow

    return _Zstd(pyarrow.CompressedInputStream(file, "zstd"))


class _Zstd:
    """The few methods of a file that reading uses."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size if size >= 0 else None)
        except OSError as error:  # pyarrow's word for damaged data; a failing disk would have failed before
            raise EOFError(str(error)) from None


def check_encoding(path: Path, head: bytes) -> None:
    """DataError for UTF-16, which some spreadsheets write."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16, allowed is UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`")
