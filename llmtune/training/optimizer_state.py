"""Optimiser state that belongs to a shard of a parameter: how it is named in a checkpoint, and how it is cut anew.

Most optimisers keep tensors shaped like the parameter, and torch cuts those for any number of ranks. Others keep
something of their own for the shard a rank holds (8-bit codes with one scale for each block of that shard). Such state
is stored under the shard's bounds, `optim/NAME/KEY/0:16,0:64`. Ranks that hold the same shard continue bit for bit; any
other shard is put together from those that overlap it, if the optimiser is a `Repacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from llmtune.distributed.placement import local, local_box

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtune.contract.optimizers import Repacks

Box = tuple[tuple[int, int], ...]
"""`[start, stop)` in each dimension of the whole parameter."""


def box_of(parameter: Tensor) -> Box:
    """What of `parameter` this rank holds."""
    found = local_box(parameter)
    if found is None:
        return tuple((0, size) for size in parameter.shape)
    return tuple((part.start, part.stop) for part in found)


def is_empty(box: Box) -> bool:
    """Whether a rank has nothing of a parameter, as where there are more ranks than rows."""
    return any(stop <= start for start, stop in box)


def box_text(box: Box) -> str:
    """As it stands in a key: `0:16,0:64`."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def parse_box(text: str) -> Box:
    """The reverse of `box_text`."""
    bounds = (part.partition(":") for part in text.split(","))
    return tuple((int(start), int(stop)) for start, _, stop in bounds)


def belongs_to_a_shard(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether any tensor of `state` is not simply one number for each of the parameter's."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    sharded = isinstance(parameter, DTensor)
    return any(isinstance(value, DTensor) != sharded or value.shape != parameter.shape for value in tensors)


def overlap(one: Box, other: Box) -> Box | None:
    """What two shards of a parameter share; None for nothing."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if is_empty(shared) else shared


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """`inner` as slices of a tensor that holds `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def repacked(
    optimizer: Repacks, parameter: nn.Parameter, shards: Mapping[Box, Mapping[str, str]], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """State of this rank's shard, made of stored ones. `shards` maps bounds to {state key: key in the checkpoint}."""
    mine, values = box_of(parameter), {}
    for theirs, keys in shards.items():
        shared = overlap(mine, theirs)
        if shared is None:
            continue
        device = parameter.device
        unpacked = optimizer.unpack({name: read(key).to(device) for name, key in keys.items()})
        for name, value in unpacked.items():
            if name not in values:
                values[name] = torch.zeros_like(local(parameter.detach()), dtype=value.dtype)
            values[name][within(shared, mine)] = value[within(shared, theirs)]
    return dict(optimizer.pack(parameter, values))


def stored_tensors(folder: Path) -> Callable[[str], Tensor]:
    """A reader of single whole tensors from the safetensors files in `folder`, by key."""
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where.update(dict.fromkeys(file.keys(), path))

    def read(key: str) -> Tensor:
        with safe_open(where[key], "pt") as file:
            return file.get_tensor(key)

    return read
