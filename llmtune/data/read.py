"""Files and hub data sets become rows, each with its origin. Nothing here knows what a row means."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.data.config import Source
from llmtune.data.locate import locate
from llmtune.errors import DataError

LONGEST_LINE_BYTES = 256 * 2**20
"""A longer line is an error: more likely a file without line ends than one sample."""


class Row(NamedTuple):
    """One row as it was read, or the reason why it could not be."""

    data: Any
    origin: str
    """`path:line` or `path:row N`, both counted from 1."""
    problem: str | None = None
    """What is wrong with the row's bytes, with an excerpt; then `data` is None."""


def read_rows(source: Source, base_dir: Path) -> Iterator[Row]:
    """Rows of a data set, files in order of their names; DataError where a whole file cannot be read."""
    found = locate(source, base_dir)
    if isinstance(found, str):
        yield from _hub_rows(found, source)
        return
    for path in found:
        try:
            yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from None


def _json_rows(path: Path) -> Iterator[Row]:
    """JSON Lines, or one JSON array, whatever the file's ending says."""
    with path.open("rb") as file:
        head = file.read(4096)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: is UTF-16, allowed is UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`")
        if head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _array_rows(path)
    elif path.suffix == ".json" and start.startswith(b"{") and _is_one_object(path):
        raise DataError(f"{path}: holds one JSON object, allowed is an array of rows or one row a line; wrap it in [ ]")
    else:
        yield from _line_rows(path)


def _is_one_object(path: Path) -> bool:
    # Only a file whose first line is not a row by itself is worth reading as a whole.
    with path.open("rb") as file:
        first = file.readline(LONGEST_LINE_BYTES).removeprefix(codecs.BOM_UTF8)
    try:
        json.loads(first)
    except ValueError:
        try:
            json.loads(path.read_bytes().decode("utf-8-sig"))
        except ValueError:
            return False
        return True
    return False


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number, position = 0, 0
        while line := file.readline(LONGEST_LINE_BYTES):
            number += 1
            if len(line) == LONGEST_LINE_BYTES:
                raise DataError(f"{path}:{number}: longer than {LONGEST_LINE_BYTES >> 20} MiB; is it one row a line?")
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if raw.strip():
                yield _line_row(raw, f"{path}:{number}", position + len(line) - len(raw), raw.endswith(b"\n"))
            position += len(line)


def _line_row(raw: bytes, origin: str, position: int, ended: bool) -> Row:
    try:
        return Row(json.loads(raw.decode().rstrip()), origin)
    except UnicodeDecodeError as error:
        return Row(None, origin, _utf8_problem(origin, raw, error, position))
    except json.JSONDecodeError as error:
        cause = "the last line is cut off, was the file copied whole?" if not ended else f"not JSON: {error.msg}"
        return Row(None, origin, f"{origin}:{error.colno}: {cause} Found {_excerpt(error.doc, error.pos)}")
    except RecursionError:
        return Row(None, origin, f"{origin}:1: nested too deeply")


def _utf8_problem(place: str, raw: bytes, error: UnicodeDecodeError, position: int) -> str:
    text = raw.decode("utf-8", "replace")
    column = len(raw[: error.start].decode("utf-8")) + 1
    return (
        f"{place}:{column}: byte 0x{raw[error.start]:02x} at offset {position + error.start} of the file is not UTF-8; "
        f"save the file as UTF-8. Found {_excerpt(text, column - 1)}"
    )


def _array_rows(path: Path) -> Iterator[Row]:
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        rows = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        rest = raw[line_start : error.start + 200]
        inner = UnicodeDecodeError("utf-8", rest, error.start - line_start, error.start - line_start + 1, error.reason)
        offset = path.stat().st_size - len(raw) + line_start
        raise DataError(_utf8_problem(f"{path}:{line}", rest, inner, offset)) from None
    except json.JSONDecodeError as error:
        cut = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated")
        cause = "the array is cut off, was the file copied whole?" if cut else f"not JSON: {error.msg}."
        place = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: {cause} Found {_excerpt(error.doc, error.pos)}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    for number, data in enumerate(rows, start=1):
        yield Row(data, f"{path}:row {number}")


def _excerpt(text: str, at: int, around: int = 30) -> str:
    """The text around a character, which is marked: `..."a": tru>>>e}...`."""
    before, after = text[max(0, at - around) : at], text[at : at + around]
    shown = f"{before}>>>{after}".replace("\n", "\\n").replace("\r", "\\r")
    return f"{'...' if at > around else ''}{shown}{'...' if at + around < len(text.rstrip()) else ''}"


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(_without_nulls(data), f"{path}:row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


def _hub_rows(name: str, source: Source) -> Iterator[Row]:
    told = f'"{source.path}" is no local path, so it was read as the hub data set {name}'
    if source.path.startswith("hub:"):
        told = f"hub data set {name}"
    try:
        import datasets
    except ImportError:
        raise DataError(f"{told}, which needs the datasets library; run `pip install datasets`") from None
    try:
        table = datasets.load_dataset(name, source.subset, split=source.split)
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{told}, which could not be loaded: {text}. Check the id, split and subset, the network and "
            "HF_HUB_OFFLINE, or name a local file"
        ) from error
    for number, data in enumerate(table, start=1):
        yield Row(_without_nulls(data), f"hub:{name}:row {number}")


def _without_nulls(value: Any) -> Any:
    """A table fills columns that a row lacks with null; without them a row reads as it does from JSON."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
