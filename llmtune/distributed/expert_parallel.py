"""Expert parallelism: each rank of a group holds some of every layer's experts, and tokens travel to them.

transformers exchanges the tokens (`EPImplementation` in `transformers.distributed.expert_parallel`) and says in a
model's `ep_plan` which tensors hold experts. Ranks that hold the same experts shard them between them with FSDP2.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from torch import nn

    from llmtune.contract.records import ParallelDims

SINCE = "5.23"
"""transformers' version whose exchange of tokens gives right gradients with and without tensor parallelism."""
EXCHANGE, BY_EXPERT = "ep_dispatch_experts", "grouped_gemm"
"""Styles of a plan: a module whose tokens are exchanged, and a tensor whose first dimension is experts."""


def expert_plan(model: Any) -> dict[str, str]:
    """transformers' expert plan, by full name, a module's tensors before the module; empty for other models."""
    plan = dict(getattr(model, "ep_plan", None) or {})

    def style(name: str) -> str | None:
        return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))

    found = {}
    for path, module in model.named_modules() if plan else ():
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        found |= {name: chosen for name in [*names, path] if (chosen := style(name))}
    return found


def expert_modules(model: Any) -> list[str]:
    """Names of the modules that hold a layer's experts."""
    return [name for name, style in expert_plan(model).items() if style == EXCHANGE]


def too_old() -> str | None:
    """What is wrong with transformers' version, if it is one that cannot spread experts."""
    version = transformers.__version__
    if Version(version) >= Version(f"{SINCE}.0.dev0"):
        return None
    return f"needs transformers {SINCE} or newer, but this is {version}"


def spread_experts(model: Any, dims: ParallelDims, mesh: Any) -> list[tuple[nn.Module, Any]]:
    """Give each rank its experts and let tokens travel; everything is on the meta device.

    `mesh` is that of all parameters. Returns the modules that hold experts, each with the mesh of the ranks that hold
    the same ones (and, where the model is replicated, their copies): what FSDP2 has to shard them over.
    """
    # Semi-public, and not in every version (`too_old`). Nothing public spreads experts of a model that transformers did
    # not load.
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    same = dims.shard * dims.tensor // dims.expert
    # A mesh of its own, as the groups cut across those of `shard` and `tensor`; `alone` is a tensor group of one rank.
    names = ("replicate", "same_experts", "expert", "alone")
    experts = init_device_mesh(mesh.device_type, (dims.replicate, same, dims.expert, 1), mesh_dim_names=names)
    sharing = mesh["tensor"] if dims.tensor > 1 else experts["alone"]
    apply_expert_parallelism(model, experts["expert"], sharing, expert_plan(model))
    over = experts["replicate", "same_experts"] if dims.replicate > 1 else experts["same_experts"]
    return [(model.get_submodule(name), over) for name in expert_modules(model)]
