"""torch's AdamW with two groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmtune import PlanError

from . import AdamWConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch >= 2.11 has a fused AdamW."""

Named = Sequence[tuple[str, nn.Parameter]]


class AdamWFactory:
    """Makes `torch.optim.AdamW` for plain parameters and for shards (DTensor) alike."""

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config

    def create(self, decay: Named, no_decay: Named, lr: float) -> torch.optim.AdamW:
        """`decay` gets the recipe's weight decay, `no_decay` none. Raises PlanError if `fused: true` is impossible."""
        config = self.config
        require_parameters(decay, no_decay)
        groups = decay_groups(decay, no_decay, config.weight_decay)
        fused = choose_fused(config.fused, [*decay, *no_decay])
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
        if fused:
            optimizer.register_step_pre_hook(place_step_counters)
        return optimizer


def decay_groups(decay: Named, no_decay: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for torch, leaving out empty ones."""
    return [
        {"params": [parameter for _, parameter in named], "weight_decay": rate}
        for named, rate in ((decay, weight_decay), (no_decay, 0.0))
        if named
    ]


def require_parameters(decay: Named, no_decay: Named) -> None:
    """PlanError where nothing trains."""
    if not decay and not no_decay:
        raise PlanError("optim_config: no parameter of the model trains; let peft_config leave some trainable")


def choose_fused(wanted: bool | None, named: Named) -> bool:
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
