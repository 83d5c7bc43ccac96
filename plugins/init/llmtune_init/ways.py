"""The three ways. Each fetches one tensor, or the rows of it that this rank keeps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llmtune import TensorReader


class OnMeta:
    """Nothing is whole anywhere: a rank reads its rows from the file."""

    whole = False

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key) if rows is None else reader.rows(key, *rows)


class OnDefault:
    """Every rank reads the whole tensor."""

    whole = True

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        return reader.read(key)


class OnRank0:
    """Only rank 0 reads files; the others are told names, shapes and types, and are sent the tensors."""

    whole = True
    only_first = True

    def fetch(self, reader: TensorReader, key: str, rows: tuple[int, int] | None) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return reader.read(key)
        first = dist.get_rank() == 0
        tensor = reader.read(key) if first else torch.empty(reader.shape(key), dtype=reader.dtype(key))
        if torch.cuda.is_available() and "nccl" in dist.get_backend_config():
            tensor = tensor.cuda()
        dist.broadcast(tensor, src=0)
        return tensor
