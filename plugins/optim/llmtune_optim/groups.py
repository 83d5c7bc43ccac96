"""What every optimiser asks of the groups that it is given, and of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmtune import ParameterGroup, PlanError


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of an optimiser's `step` computes, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def torch_groups(groups: Sequence[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
    """The groups as torch's optimisers take them."""
    return [
        {
            "params": [parameter for _, parameter in group.parameters],
            "lr": group.lr,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]


def require_parameters(groups: Sequence[ParameterGroup]) -> None:
    """PlanError where nothing trains."""
    if not any(group.parameters for group in groups):
        raise PlanError("optim_config: no parameter of the model trains; let peft_config leave some trainable")
