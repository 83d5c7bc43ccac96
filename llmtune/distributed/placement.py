"""Which piece of a tensor this rank holds, and how to put a value there or bring the pieces together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from torch import Tensor, nn


def local_box(tensor: Tensor) -> tuple[slice, ...] | None:
    """This rank's piece of a sharded tensor as slices of the full one; None for a tensor held whole."""
    if not isinstance(tensor, DTensor):
        return None
    # Private to torch, and the one function that knows uneven and nested shards.
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local_rows(tensor: Tensor) -> tuple[int, int] | None:
    """`(start, stop)` if this rank holds whole rows of a sharded tensor, else None."""
    box = local_box(tensor)
    if box is None or tensor.dim() == 0:
        return None
    if any(part != slice(0, size) for part, size in zip(box[1:], tensor.shape[1:], strict=True)):
        return None
    return min(box[0].start, tensor.shape[0]), min(box[0].stop, tensor.shape[0])


def shard_group(tensor: Tensor) -> Any:
    """The process group whose ranks hold the pieces of a sharded tensor, in order; None for a tensor held whole."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert len(dims) == 1, "pieces of a tensor that is sharded twice have no single order"
    return tensor.device_mesh.get_group(dims[0])


def local(tensor: Tensor) -> Tensor:
    """The piece in this rank's memory; shares storage with `tensor`."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def put(tensor: Tensor, value: Tensor, whole: bool = True, grown: bool = False) -> None:
    """Write `value` (the whole tensor, or this rank's rows) into `tensor`, casting and moving as needed.

    `grown`: the tensor has more rows than `value`, which goes into the first ones.
    """
    box = local_box(tensor)
    if whole and box is not None:
        value = value[box]
    place = local(tensor)
    with torch.no_grad():
        (place[: value.shape[0]] if grown else place).copy_(value)


def full(tensor: Tensor, copy: bool = True) -> Tensor:
    """The whole tensor on CPU; without a copy it may be the memory of the tensor itself. Collective for sharded
    tensors: every rank must call it."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", copy=copy)


def materialise(model: nn.Module, device: torch.device, shards: torch.device | None = None) -> None:
    """Turn every meta tensor into an empty real one on `device`, and move real ones there. Ties survive.

    Shards go to `shards` where that is given: host memory, for parameters that stay there.
    """
    ties = _tied_places(model)

    def real(tensor: Tensor) -> Tensor:
        place = shards if shards is not None and isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    # `_apply` is what `to_empty` uses; FSDP2 hooks into it to adopt the new shards.
    model._apply(real)
    for (module, name), *others in ties:
        for other, alias in others:
            other._parameters[alias] = module._parameters[name]


def _tied_places(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run with torch's CPU generator seeded from `parts` alone, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(_seed(parts))
        yield


def seeded_step(*parts: int) -> None:
    """Seed torch's generators on all devices from `parts`, for the randomness of one micro-batch."""
    torch.manual_seed(_seed(parts))


def _seed(parts: tuple[object, ...]) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
