"""The recipe's optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.model.parameter_groups import create_optimizer, model_groups, optimizer_context

if TYPE_CHECKING:
    import torch

    from llmtune.planning.plan import Plan


def make_optimizer(plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of all parameters that train in the plan's model, at the recipe's learning rate."""
    module, train = plan.model.module, plan.recipe.train
    groups = model_groups(module, plan.model.ledger, train.learning_rate)
    context = optimizer_context(module, train.learning_rate, train.seed)
    return create_optimizer(plan.parts.one("optim_config").built, groups, context)
