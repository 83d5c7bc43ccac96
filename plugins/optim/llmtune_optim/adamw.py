"""torch's AdamW for any groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmtune import OptimizerContext, ParameterGroup, PlanError

from . import AdamWConfig
from .groups import require_parameters, torch_groups
from .whole import WholeMatrixOptimizer, whole_groups

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch >= 2.11 has a fused AdamW."""


class AdamWFactory:
    """Makes `torch.optim.AdamW` for plain parameters and for shards (DTensor) alike."""

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config
        self.layerwise = config.layerwise

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> torch.optim.Optimizer:
        """The recipe's weight decay for groups that decay. Raises PlanError if `fused: true` is impossible."""
        config = self.config
        require_parameters(groups)
        if config.layerwise:
            settings = {"betas": config.betas, "eps": config.eps}
            return WholeMatrixOptimizer(*whole_groups(groups, lambda *_: False, {}, settings, config.weight_decay))
        fused = choose_fused(config.fused, [pair for group in groups for pair in group.parameters])
        optimizer = torch.optim.AdamW(
            torch_groups(groups, config.weight_decay), betas=config.betas, eps=config.eps, fused=fused
        )
        if fused:
            optimizer.register_step_pre_hook(place_step_counters)
        return optimizer


def choose_fused(wanted: bool | None, named: Sequence[tuple[str, nn.Parameter]]) -> bool:
    """The recipe's `fused`, or for null whether the kernel exists for all parameters."""
    unsuited = [
        (name, parameter)
        for name, parameter in named
        if not parameter.is_floating_point() or parameter.device.type not in FUSED_DEVICES
    ]
    if wanted and unsuited:
        name, parameter = unsuited[0]
        raise PlanError(
            f"optim_config.fused: found true, but {name} is {parameter.dtype} on {parameter.device.type} and the fused "
            f"AdamW needs floating-point parameters on {', '.join(FUSED_DEVICES)}; leave fused out"
        )
    return not unsuited if wanted is None else wanted


def place_step_counters(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Move restored step counters to their parameter's device: the fused kernel reads them there."""
    for parameter, state in optimizer.state.items():
        step = state.get("step")
        if step is not None and step.device != parameter.device:
            state["step"] = step.to(parameter.device)
