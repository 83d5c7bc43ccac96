"""An optimiser for a handful of parameters, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmtune.contract.optimizers import OptimizerFactory, ParameterRole
    from llmtune.planning.plan import Plan


def create_for(
    factory: OptimizerFactory, named: Sequence[tuple[str, nn.Parameter]], lr: float = 1e-3,
    roles: Mapping[str, ParameterRole] | None = None, lr_factors: Mapping[str, float] | None = None, **facts: Any,
) -> torch.optim.Optimizer:  # fmt: skip
    """What the factory makes of these parameters. Those without a role in `roles` are matrices, or vectors of norms.

    `facts` are fields of `OptimizerContext`, `lr_factors` what a peft method asks for.
    """
    from llmtune.contract.optimizers import OptimizerContext
    from llmtune.model.parameter_groups import create_optimizer, group_parameters

    by_shape: dict[str, ParameterRole] = {name: "matrix" if one.dim() > 1 else "norm" for name, one in named}
    groups = group_parameters(named, {**by_shape, **(roles or {})}, lr_factors or {}, lr)
    return create_optimizer(factory, groups, OptimizerContext(learning_rate=lr, **facts))


def learning_rates(plan: Plan) -> dict[str, float]:
    """The rate at which the plan's optimiser begins with each parameter that trains, by name."""
    from llmtune.training.optim import make_optimizer

    names = {id(parameter): name for name, parameter in plan.model.module.named_parameters()}
    groups = make_optimizer(plan).param_groups
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
