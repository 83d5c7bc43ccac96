"""Opening files, compressed or not, and telling what they hold."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.contract.errors import DataError

KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".feather": "arrow", ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
"""What a file's ending says of its content."""
COMPRESSED = (".gz", ".zst")
NAMES = ", ".join(KINDS)

_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_OTHERS = {
    b"PAR1": ("parquet", "a Parquet file"),
    b"ARROW1": ("arrow", "an Arrow file"),
    b"PK\x03\x04": (None, "a zip archive"),
}
"""First bytes of files that are no text: their kind, and what to call them."""


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
        found = next((suffix for magic, suffix in _PACKED.items() if head.startswith(magic)), None)
        if head and found != (path.suffix if path.suffix in COMPRESSED else None):
            said = f"is compressed ({found})" if found else f"is not compressed, though it ends in {path.suffix}"
            fix = f"{path.name}{found}" if found else path.stem
            raise DataError(f"{path}: {said}; rename it to {fix}")
        for magic, (kind, name) in _OTHERS.items():
            if head.startswith(magic) and kind_of(path) != kind:
                raise DataError(f"{path}: is {name}, not what its ending says; {_mend(kind)}")
        try:
            yield file if found is None else _unpacked(file, found)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: the compressed data end early or are damaged ({error}); copy it again") from None


def _mend(kind: str | None) -> str:
    return f"rename it to end in .{kind}" if kind else "unpack it and name what is inside"


def _unpacked(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    import pyarrow

    return io.BufferedReader(_Zstd(pyarrow.CompressedInputStream(file, "zstd")), 2**20)


class _Zstd(io.RawIOBase):
    """pyarrow's stream as Python's, with the same error for damaged data as gzip's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:  # pyarrow's word for damaged data; a failing disk would have failed before
            raise EOFError(str(error)) from None
        buffer[: len(block)] = block
        return len(block)


def check_encoding(path: Path, head: bytes) -> None:
    """DataError for UTF-16 and UTF-32, which some spreadsheets and shells write."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        found = "UTF-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        found = "UTF-16"
    elif len(head) > 3 and not head[1:32:2].strip(b"\0"):  # English in UTF-16: each other byte is zero
        found = "UTF-16LE"
    elif len(head) > 3 and not head[0:32:2].strip(b"\0"):
        found = "UTF-16BE"
    else:
        return
    raise DataError(f"{path}: is {found}, allowed is UTF-8; convert it with `iconv -f {found} -t UTF-8`")
