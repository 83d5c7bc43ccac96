"""Reading a folder of safetensors: keys, shapes, whole tensors, rows. Nothing here knows of models.

Tensors are read into memory of their own instead of being mapped: pages of a mapped file count as the process's memory
until the file is closed, which would double what a rank seems to hold while it loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.contract.errors import LoadError
from llmtune.model.weight_files import INDEX, weight_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. Plain values, so that one rank can tell the others."""

    file: str
    dtype: str
    """As safetensors names it, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int


def read_index(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers of its files. Raises LoadError naming the damaged file."""
    names = weight_names(folder)
    wanted = None
    if (folder / INDEX).is_file():
        wanted = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, Entry] = {}
    for name in names:
        found |= {key: entry for key, entry in _header(folder / name).items() if not wanted or wanted.get(key) == name}
    if lacking := sorted(set(wanted or ()) - set(found)):
        raise LoadError(f"{folder / INDEX}: names {lacking[0]}, which its file does not hold; {AGAIN}")
    return found


def _header(path: Path) -> dict[str, Entry]:
    """Entries of one file: 8 bytes with the length of the header, the header (JSON), the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            size = path.stat().st_size
        header.pop("__metadata__", None)
        found = {}
        for key, facts in header.items():
            start, stop = (8 + length + offset for offset in facts["data_offsets"])
            entry = Entry(path.name, facts["dtype"], tuple(facts["shape"]), start, stop)
            if not 8 + length <= start <= stop <= size or stop - start != _bytes(entry):
                raise ValueError(f"{key} lies at bytes {start} to {stop} of {size}")
            found[key] = entry
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise LoadError(f"{path}: cannot be read as safetensors ({error}); {AGAIN}") from error


def _bytes(entry: Entry) -> int:
    size = torch_type(entry.dtype).itemsize
    for extent in entry.shape:
        size *= extent
    return size


class FolderReader:
    """The tensors of a model folder, whether one file or an index with several. Use as a context manager."""

    def __init__(self, folder: Path, index: Mapping[str, Entry] | None = None) -> None:
        """`index` is what `read_index` says of the folder, where that is known already."""
        self.folder = folder
        self.index = read_index(folder) if index is None else index
        self.bytes_read = 0
        self._stack = ExitStack()
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def keys(self) -> list[str]:
        return list(self.index)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.index[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return torch_type(self.index[key].dtype)

    def read(self, key: str) -> Tensor:
        entry = self.index[key]
        return self._read(entry, entry.start, entry.stop, entry.shape)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the first dimension, without reading the others."""
        entry = self.index[key]
        width = (entry.stop - entry.start) // max(entry.shape[0], 1)
        shape = (max(stop - start, 0), *entry.shape[1:])
        return self._read(entry, entry.start + start * width, entry.start + max(start, stop) * width, shape)

    def _read(self, entry: Entry, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        import torch

        path = self.folder / entry.file
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = self._stack.enter_context(path.open("rb", buffering=0))
            file = self._open[entry.file]
            file.seek(start)
            while view:
                count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"ends {len(view)} bytes too early")
                view = view[count:]
        except OSError as error:
            raise LoadError(f"{path}: cannot be read as safetensors ({error}); {AGAIN}") from error
        self.bytes_read += stop - start
        return buffer.view(torch_type(entry.dtype)).reshape(shape)


def torch_type(name: str) -> torch.dtype:
    """torch's type for safetensors' name of it. ValueError for one that llmtune does not read."""
    import torch

    types: dict[str, Any] = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    if name not in types:
        raise ValueError(f"tensors of type {name} are not supported")
    return types[name]
