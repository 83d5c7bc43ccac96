"""Expert parallelism: each rank of a group holds some of every layer's experts, and tokens travel to them.

transformers exchanges the tokens (`EPImplementation` in `transformers.distributed.expert_parallel`) and says in a
model's `ep_plan` which tensors hold experts. Ranks that hold the same experts shard them between them with FSDP2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from llmtune.contract.records import ParallelDims
    from llmtune.model.edits import Ledger

SINCE = "5.23"
"""transformers' version whose exchange of tokens gives right gradients with and without tensor parallelism."""
EXCHANGE, BY_EXPERT = "ep_dispatch_experts", "grouped_gemm"
"""Styles of a plan: a module whose tokens are exchanged, and a tensor whose first dimension is experts."""


def plan_for(model: Any) -> dict[str, str]:
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
    return [name for name, style in plan_for(model).items() if style == EXCHANGE]


def objections(model: Any, ledger: Ledger, layout: ParallelDims) -> Iterator[str]:
    """Why the experts of this model, as it was edited, cannot be spread over `layout.expert` ranks."""
    size, group = layout.expert, layout.shard * layout.tensor
    if size == 1:
        return
    plan = plan_for(model)
    if version := too_old():
        yield f"ep_size is {size}, which needs transformers {SINCE} or newer, but this is {version}; use 1 or update it"
    elif layout.context > 1:
        yield f"ep_size is {size} beside cp_size {layout.context}, which are not combined; set one of them to 1"
    elif EXCHANGE not in plan.values():
        yield f"ep_size is {size}, but transformers has no expert parallel plan for {type(model).__name__}; use 1"
    elif size % layout.tensor or group % size:
        yield (
            f"ep_size is {size}, allowed is a multiple of tp_size ({layout.tensor}) that divides the {group} ranks "
            "of a copy"
        )
    else:
        for name in expert_modules(model):
            if sentence := _objection(model, ledger, plan, name, size):
                yield f"ep_size is {size}, but {sentence}"
                return


def too_old() -> str | None:
    """transformers' version, if it is one that cannot spread experts."""
    import transformers
    from packaging.version import Version

    return transformers.__version__ if Version(transformers.__version__) < Version(f"{SINCE}.0.dev0") else None


def _objection(model: Any, ledger: Ledger, plan: dict[str, str], name: str, size: int) -> str | None:
    originals = set(ledger.direct.values())
    for other, parameter in model.get_submodule(name).named_parameters(prefix=name):
        if other not in originals or plan.get(other) != BY_EXPERT:
            return f"{other} is not a tensor of the original model with an expert in each row; use 1"
        if parameter.shape[0] % size:
            return f"{name} has {parameter.shape[0]} experts to share out; use a divisor of {parameter.shape[0]}"
    return None


def spread_experts(model: Any, layout: ParallelDims, mesh: Any) -> list[tuple[nn.Module, Any]]:
    """Give each rank its experts and let tokens travel; everything is on the meta device.

    `mesh` is that of all parameters. Returns the modules that hold experts, each with the mesh of the ranks that hold
    the same ones (and, where the model is replicated, their copies): what FSDP2 has to shard them over.
    """
    from torch.distributed.device_mesh import init_device_mesh

    # Semi-public, the one place that uses it: nothing public spreads experts of a model that transformers did not load.
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    same = layout.shard * layout.tensor // layout.expert
    # A mesh of its own, as the groups cut across those of `shard` and `tensor`; `alone` is a tensor group of one rank.
    names = ("replicate", "same_experts", "expert", "alone")
    experts = init_device_mesh(mesh.device_type, (layout.replicate, same, layout.expert, 1), mesh_dim_names=names)
    sharing = mesh["tensor"] if layout.tensor > 1 else experts["alone"]
    apply_expert_parallelism(model, experts["expert"], sharing, plan_for(model))
    over = experts["replicate", "same_experts"] if layout.replicate > 1 else experts["same_experts"]
    return [(model.get_submodule(name), over) for name in expert_modules(model)]
