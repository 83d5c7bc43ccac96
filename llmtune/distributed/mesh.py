"""The device mesh of a run: which ranks hold which pieces of the parameters, and which share a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import init_device_mesh

from llmtune.contract.errors import PlanError
from llmtune.contract.records import ParallelDims
from llmtune.distributed.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from llmtune.contract.records import Distribute


def arrange(ranks: Ranks, distribute: Distribute, key: str) -> Ranks:
    """`ranks`, arranged as the recipe's `dist_config` wants it. Raises PlanError if they do not fit into it."""
    dims = distribute.layout(ranks.size)
    if dims.ranks != ranks.size:
        raise PlanError(f"{key}: arranges {dims.ranks} ranks, but there are {ranks.size}; start as many as it needs")
    return replace(ranks, dims=dims)


def parameter_mesh(dims: ParallelDims, device: torch.device) -> Any:
    """The DeviceMesh that parameters are spread over: `replicate` x `shard` x `tensor`, without sizes of 1 but shard's.

    Ranks that split rows between them (context) hold different shards of the parameters, like any others.
    """
    sizes = {"replicate": dims.replicate, "shard": dims.shard * dims.context, "tensor": dims.tensor}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def divided(ranks: int, sizes: dict[str, int]) -> int:
    """Ranks left for `shard` when groups of the given sizes are formed. Raises PlanError naming the keys."""
    groups = 1
    for size in sizes.values():
        groups *= size
    if ranks % groups:
        product = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
        raise PlanError(
            f"dist_config: {product} needs a multiple of {groups} ranks, found {ranks}; "
            "start another number of ranks (--nproc) or change these sizes"
        )
    return ranks // groups
