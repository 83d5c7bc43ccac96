"""Gradient descent with the heavy ball's momentum (Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmtune import OptimizerContext, ParameterGroup

if TYPE_CHECKING:
    from acme_tuning import PolyakConfig


class Polyak:
    """An `OptimizerFactory`."""

    def __init__(self, config: PolyakConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> torch.optim.Optimizer:
        """One group for each of the recipe's."""
        made = [{"params": [one for _, one in group.parameters], "lr": group.lr} for group in groups]
        return HeavyBall(made, {"momentum": self.config.momentum})


class HeavyBall(torch.optim.Optimizer):
    """A velocity for each number, spread like its parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Roll on."""
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(parameter.grad)
                parameter.add_(state["velocity"] * -group["lr"])
