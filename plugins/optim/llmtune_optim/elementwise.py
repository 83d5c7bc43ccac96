"""Optimisers that look at each number of a parameter alone, so that shards need no ranks but their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmtune import OptimizerContext, ParameterGroup

from .configs import LionConfig, SgdConfig
from .groups import loss_of, require_parameters, torch_groups
from .whole import local


class SgdFactory:
    """Makes `torch.optim.SGD`."""

    def __init__(self, config: SgdConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> torch.optim.SGD:
        """One parameter at a time: torch's joint updates refuse parameters that are spread over different ranks."""
        require_parameters(groups)
        config = self.config
        return torch.optim.SGD(
            torch_groups(groups, config.weight_decay), momentum=config.momentum, dampening=config.dampening,
            nesterov=config.nesterov, foreach=False,
        )  # fmt: skip


class LionFactory:
    """Makes a `Lion`."""

    def __init__(self, config: LionConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> Lion:
        """All parameters alike."""
        require_parameters(groups)
        return Lion(torch_groups(groups, self.config.weight_decay), {"betas": self.config.betas})


class Lion(torch.optim.Optimizer):
    """Program 1 of the paper; its one state is `exp_avg`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                here, grad, mean = local(parameter.detach()), local(parameter.grad), local(state["exp_avg"])
                here.mul_(1 - group["lr"] * group["weight_decay"])
                here.add_(mean.lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
                mean.lerp_(grad, 1 - beta2)
        return loss
