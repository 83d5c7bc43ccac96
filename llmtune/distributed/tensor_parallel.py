"""Tensor parallelism: a group of ranks computes one batch, each with its share of every layer's matrix products.

transformers says for each model which linear layers are split by their outputs ("colwise") and which by their inputs
("rowwise"); torch's DTensor says what that means for a weight and for the sums between ranks (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053). Embeddings, norms and the output head are held whole by each rank of the group, so
that stages and kernels may use them as they like; FSDP2 shards them like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from llmtune.contract.structure import transformer_layers
from llmtune.distributed.expert_parallel import expert_modules

if TYPE_CHECKING:
    from torch import Tensor

BY_OUTPUTS = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
"""Styles that give each rank rows of the weight, so some of the outputs; whether all ranks then need all of them."""
BY_INPUTS = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
"""Styles that give each rank columns of the weight; whether the layer has to pick its inputs itself."""
SHARED = "replicated_with_grad_allreduce"
"""Norms of single heads: the same weight on all ranks, each of which sees its own heads."""
WHOLE = "replicate"
"""Held and computed alike by all ranks."""


def styles(model: Any) -> dict[str, str]:
    """What transformers' plan says of modules and bare parameters inside the transformer layers, by original name."""
    plan = dict(getattr(model, "tp_plan", None) or {})
    prefixes = tuple(f"{name}." for name, _ in transformer_layers(model))
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) for name in names if name.startswith(prefixes)}
    return {name: style for name, style in found.items() if style is not None and style != WHOLE}


def is_linear(module: Any) -> bool:
    """Whether the module computes what torch's linear layer computes."""
    return type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def base_layer(model: Any, direct: Mapping[str, str], name: str) -> Any:
    """The module that holds the weight of the original layer `name` now: itself, or what an adapter wraps.

    `direct` leads from a tensor's original name to its present one.
    """
    now = direct.get(f"{name}.weight", f"{name}.weight")
    return model.get_submodule(now.rpartition(".")[0])


def split(model: Any, direct: Mapping[str, str], follow: Mapping[str, str], mesh: Any) -> None:
    """Give each rank of `mesh` (one dimension) its share of every layer; everything is on the meta device.

    `direct` leads from a tensor's original name to its present one; `follow` holds the linear modules that an edit put
    into a layer, each with the side (`inputs`, `outputs`) on which it is split with that layer.
    """
    experts = tuple(f"{name}." for name in expert_modules(model))
    for name, style in styles(model).items():
        if f"{name}.".startswith(experts):
            continue
        if style == SHARED:
            share(model.get_submodule(name), mesh)
            continue
        split_linear(base_layer(model, direct, name), style, mesh)
        for part, side in follow.items():
            if part.startswith(f"{name}.") and side == ("outputs" if style in BY_OUTPUTS else "inputs"):
                split_linear(model.get_submodule(part), style, mesh)


def split_linear(layer: nn.Linear, style: str, mesh: Any) -> None:
    """Shard a linear layer's weight, and sum over ranks where its product is a part of the whole."""
    by_outputs = style in BY_OUTPUTS
    _place(layer, "weight", mesh, Shard(0 if by_outputs else 1))
    if by_outputs and layer.bias is not None:
        _place(layer, "bias", mesh, Shard(0))

    def outputs(input: Tensor) -> Tensor:
        y = F.linear(with_summed_gradient(input, mesh), _local(layer.weight), _local(layer.bias))
        return gathered(y, mesh) if BY_OUTPUTS[style] else y

    def inputs(input: Tensor) -> Tensor:
        y = summed(F.linear(own_part(input, mesh) if BY_INPUTS[style] else input, _local(layer.weight)), mesh)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    layer.forward = outputs if by_outputs else inputs


def share(module: nn.Module, mesh: Any) -> None:
    """Sum the gradients of a module's own parameters over ranks that each use them on other activations."""
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return
    for name in list(module._parameters):
        _place(module, name, mesh, Replicate())
    inner: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        held: dict[str, Any] = dict(module._parameters)
        module._parameters.update(
            {name: p.to_local(grad_placements=[Partial()]) for name, p in held.items() if p is not None}
        )
        try:
            return inner(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = forward


def _place(module: nn.Module, name: str, mesh: Any, placement: Any) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        # src_data_rank=None: nothing is sent; values come with the checkpoint.
        placed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module._parameters[name] = nn.Parameter(placed, requires_grad=parameter.requires_grad)


def _local(parameter: Any) -> Any:
    return None if parameter is None else parameter.to_local()


def with_summed_gradient(x: Tensor, mesh: Any) -> Tensor:
    """`x`, the same on all ranks, for a product of which each rank computes a part: gradients add up."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def summed(part: Tensor, mesh: Any) -> Tensor:
    """The sum of all ranks' parts, on all ranks."""
    return DTensor.from_local(part, mesh, [Partial()], run_check=False).full_tensor()


def gathered(part: Tensor, mesh: Any) -> Tensor:
    """All ranks' features side by side, on all ranks."""
    return DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False).full_tensor()


def own_part(x: Tensor, mesh: Any) -> Tensor:
    """This rank's features of `x`, which is the same on all ranks."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(x.dim() - 1)]).to_local()
