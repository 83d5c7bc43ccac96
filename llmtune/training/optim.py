"""The recipe's optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.model.parameter_groups import create_optimizer, group_parameters, optimizer_context, parameter_roles

if TYPE_CHECKING:
    import torch

    from llmtune.planning.plan import Plan


def make_optimizer(plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of all parameters that train in the plan's model, at the recipe's learning rate."""
    module, ledger, train = plan.model.module, plan.model.ledger, plan.recipe.train
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = group_parameters(named, parameter_roles(module, ledger.roles), ledger.lr_factors, train.learning_rate)
    context = optimizer_context(module, train.learning_rate, train.seed)
    return create_optimizer(plan.parts.one("optim_config").built, groups, context)
