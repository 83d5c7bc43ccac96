"""Reading a folder of safetensors: keys, shapes, whole tensors, rows. Nothing here knows of models."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmtune.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FolderReader:
    """The tensors of a model folder, whether one file or an index with several. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = _files_by_key(folder)

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def keys(self) -> list[str]:
        return list(self._file_of)

    def _file(self, key: str) -> Any:
        from safetensors import SafetensorError, safe_open

        name = self._file_of[key]
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise LoadError(
                    f"{path}: cannot be read as safetensors ({error}); download or copy the file again"
                ) from error
        return self._open[name]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file(key).get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        names = _torch_types()
        return names[self._file(key).get_slice(key).get_dtype()]

    def read(self, key: str) -> Tensor:
        return self._file(key).get_tensor(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the first dimension, without reading the others."""
        return self._file(key).get_slice(key)[start:stop]


def _files_by_key(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    single = folder / "model.safetensors"
    if not single.exists():
        raise LoadError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{single}: cannot be read as safetensors ({error}); download or copy the file again"
        ) from error


def _torch_types() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
