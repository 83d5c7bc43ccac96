"""One of two ranks: sharded AdamW and 8-bit AdamW against the same updates on whole parameters.

Run as `python optim_ranks.py RANK FILE`; rank 0 prints one JSON line.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from llmtune_optim import AdamW8bitConfig, AdamWConfig, build_adamw, build_adamw_8bit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from llmtune.testing import create_for

STEPS = 6


def net() -> nn.Sequential:
    """Odd sizes for uneven shards; (64, 256) and (3, 64) for whole blocks of 256 and for a rank with one row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 3), nn.Linear(3, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with gradients that depend only on the step and the parameter."""
    for step in range(first, last):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(parameter.shape, generator=generator)
            mesh = getattr(parameter, "device_mesh", None)
            parameter.grad = distribute_tensor(gradient, mesh, parameter.placements) if mesh else gradient
        optimizer.step()
        optimizer.zero_grad()


def make(build, config, model: nn.Module) -> torch.optim.Optimizer:
    return create_for(build(config), list(model.named_parameters()), 1e-2)


def worst(whole: nn.Module, sharded: nn.Module) -> list[float]:
    """Largest difference per parameter."""
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    return [float((a - b.full_tensor()).abs().max()) for a, b in pairs]


def compare(build, config, mesh: DeviceMesh) -> list[float]:
    whole, sharded = net(), fully_shard(net(), mesh=mesh)
    for model in (whole, sharded):
        train(model, make(build, config, model), 0, STEPS)
    return worst(whole, sharded)


def resume_8bit(mesh: DeviceMesh, config: AdamW8bitConfig) -> bool:
    """A sharded run, interrupted and continued with a fresh optimiser, on this rank bit for bit."""
    straight, broken = fully_shard(net(), mesh=mesh), fully_shard(net(), mesh=mesh)
    train(straight, make(build_adamw_8bit, config, straight), 0, STEPS)
    first = make(build_adamw_8bit, config, broken)
    train(broken, first, 0, 3)
    second = make(build_adamw_8bit, config, broken)
    for parameter in broken.parameters():
        for key, value in first.state.get(parameter, {}).items():
            second.state[parameter][key] = value.clone() if isinstance(value, torch.Tensor) else value
    train(broken, second, 3, STEPS)
    pairs = zip(straight.parameters(), broken.parameters(), strict=True)
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


def columns_8bit(mesh: DeviceMesh) -> float:
    """A parameter sharded by columns, whose local part is no contiguous view, must still be updated in place."""
    whole = nn.ParameterList([nn.Parameter(torch.ones(64, 256))])
    sharded = nn.ParameterList([nn.Parameter(distribute_tensor(torch.ones(64, 256), mesh, [Shard(1)]))])
    for model in (whole, sharded):
        train(model, make(build_adamw_8bit, AdamW8bitConfig(min_8bit_size=10**9), model), 0, 2)
    return worst(whole, sharded)[0]


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    narrow = AdamW8bitConfig(weight_decay=0.1)
    result = {
        "fused": compare(build_adamw, AdamWConfig(weight_decay=0.1), mesh),
        "plain": compare(build_adamw, AdamWConfig(weight_decay=0.1, fused=False), mesh),
        "8bit": compare(build_adamw_8bit, narrow, mesh),
        "columns": columns_8bit(mesh),
    }
    resumed: list[bool] = [False, False]
    dist.all_gather_object(resumed, resume_8bit(mesh, narrow))
    if rank == 0:
        print(json.dumps(result | {"resumed": resumed}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
