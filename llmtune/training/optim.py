"""Which parameters decay, and making the recipe's optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmtune.contract.records import OptimizerFactory


def make_optimizer(factory: OptimizerFactory, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Weight decay for matrices only: norms, biases and other vectors have none (as transformers' Trainer does)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decay = [(name, parameter) for name, parameter in named if parameter.dim() > 1]
    no_decay = [(name, parameter) for name, parameter in named if parameter.dim() <= 1]
    optimizer = factory.create(decay, no_decay, learning_rate)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer
