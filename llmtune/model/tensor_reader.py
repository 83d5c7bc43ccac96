"""Reading tensors of a folder of safetensors: whole, or some of their rows. Nothing here knows of models.

Tensors are read into memory of their own instead of being mapped: pages of a mapped file count as the process's memory
until the file is closed, which would double what a rank seems to hold while it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from llmtune.contract.errors import LoadError
from llmtune.model.weight_files import StoredTensor, read_index, torch_type

if TYPE_CHECKING:
    from torch import Tensor


class FolderReader(ExitStack):
    """The tensors of a model folder, whether one file or several. A context manager, as it keeps files open."""

    def __init__(self, folder: Path, index: Mapping[str, StoredTensor] | None = None) -> None:
        """`index` is what `read_index` says of the folder, where that is known already."""
        super().__init__()
        self.folder = folder
        self.index = read_index(folder) if index is None else index
        self.bytes_read = 0
        self._open: dict[str, BinaryIO] = {}

    def keys(self) -> list[str]:
        return list(self.index)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.index[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return torch_type(self.index[key].dtype)

    def read(self, key: str) -> Tensor:
        tensor = self.index[key]
        return self._read(tensor, tensor.start, tensor.stop, tensor.shape)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the first dimension, without reading the others."""
        tensor = self.index[key]
        width = (tensor.stop - tensor.start) // max(tensor.shape[0], 1)
        shape = (max(stop - start, 0), *tensor.shape[1:])
        return self._read(tensor, tensor.start + start * width, tensor.start + max(start, stop) * width, shape)

    def _read(self, tensor: StoredTensor, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        path = self.folder / tensor.file
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            if tensor.file not in self._open:
                self._open[tensor.file] = self.enter_context(path.open("rb", buffering=0))
            file = self._open[tensor.file]
            file.seek(start)
            while view:
                count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"ends {len(view)} bytes too early")
                view = view[count:]
        except OSError as error:
            raise LoadError(
                f"{path}: cannot be read as safetensors ({error}); download or copy the file again"
            ) from error
        self.bytes_read += stop - start
        return buffer.view(torch_type(tensor.dtype)).reshape(shape)
