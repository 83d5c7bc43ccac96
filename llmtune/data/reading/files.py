"""Opening files, compressed or not, and telling what they hold."""

from __future__ import annotations

import gzip
import json
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
        packing = next((suffix for magic, suffix in _PACKED.items() if head.startswith(magic)), None)
        if head and packing != (path.suffix if path.suffix in COMPRESSED else None):
            said = f"is compressed ({packing})" if packing else f"is not compressed, though it ends in {path.suffix}"
            fix = f"{path.name}{packing}" if packing else path.stem
            raise DataError(f"{path}: {said}; rename it to {fix}")
        for magic, (kind, name) in _OTHERS.items():
            if head.startswith(magic) and kind_of(path) != kind:
                fix = f"rename it to end in .{kind}" if kind else "unpack it and name what is inside"
                raise DataError(f"{path}: is {name}, not what its ending says; {fix}")
        try:
            yield file if packing is None else _unpacked(file, packing)
        except (EOFError, zlib.error, OSError) as error:
            if packing is None or (isinstance(error, OSError) and error.errno):  # a failing disk has a number
                raise
            raise DataError(f"{path}: the compressed data end early or are damaged ({error}); copy it again") from None


def _unpacked(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # pyarrow's takes zeros after the data, which gzip allows, for damage
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


def check_encoding(path: Path, head: bytes) -> None:
    """DataError for UTF-16 and UTF-32, which some spreadsheets and shells write."""
    encoding = json.detect_encoding(head)
    is_text = head[:8].decode(encoding, "ignore").lstrip()[:1].isprintable()  # else its rows are told as bad ones
    if is_text and not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise DataError(f"{path}: is {name}, allowed is UTF-8; convert it with `iconv -f {name} -t UTF-8`")
