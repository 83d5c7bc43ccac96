"""The recipe's optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.contract.structure import output_heads
from llmtune.model.parameter_groups import create_optimizer, model_groups, optimizer_context

if TYPE_CHECKING:
    import torch

    from llmtune.planning.plan import Plan


def make_optimizer(plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of all parameters that train in the plan's model, at the recipe's learning rate."""
    module, train = plan.model.module, plan.recipe.train
    groups = model_groups(module, plan.model.ledger, train.learning_rate)
    new = frozenset(plan.model.ledger.fresh)
    if plan.model.keys.model_class == "cls":
        heads = output_heads(module)
        new |= {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in heads}
    context = optimizer_context(module, train.learning_rate, train.seed, new)
    return create_optimizer(plan.parts.one("optim_config").built, groups, context)
