"""A run taken apart: what `llmtune.train` puts together, for tests that look inside a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.loop import StepStats, Training


def plan_here(keys: dict[str, Any]) -> Plan:
    """The recipe's plan for this process, as one of the ranks that the environment names."""
    import torch

    from llmtune.distributed.ranks import join, ranks_from_environment
    from llmtune.planning.make import make_plan
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry

    ranks, device = ranks_from_environment(), torch.device("cpu")
    join(ranks, device)
    return make_plan(load_recipe(keys), Registry(), ranks, device)


def start(keys: dict[str, Any]) -> tuple[Plan, Training]:
    """A training run with its weights loaded, before its first step."""
    from llmtune.training.building import build_objective, make_training
    from llmtune.training.optim import make_optimizer

    plan = plan_here(keys)
    objective = build_objective(plan.model)
    optimizer = make_optimizer(plan)
    return plan, make_training(plan, objective, optimizer)


def one_step(training: Training, step: int = 0) -> dict[str, Any]:
    """Forward and backward passes of all micro-batches of a step; gradients are left in place."""
    import torch

    from llmtune.training.loop import forward_backward

    training.objective.train()
    micros = training.batches.step(step, training.device)
    weight = torch.tensor(float(sum(micro.weight for micro in micros)))
    return forward_backward(training, micros, weight, step)


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.stats: list[StepStats] = []

    def after_step(self, step: int, stats: StepStats) -> bool:
        self.stats.append(stats)
        return False
