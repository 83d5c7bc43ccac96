"""Muon: momentum, made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; for language models
Liu et al. 2025, https://arxiv.org/abs/2502.16982). On one device it is torch.optim.Muon, number for number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import OptimizerContext, ParameterGroup

from .configs import MuonConfig
from .whole import Whole, WholeMatrixOptimizer, local, whole_groups

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic iteration, from the first of the two sources; its slope at zero is as steep as can be."""


class MuonFactory:
    """Makes a `Muon`."""

    def __init__(self, config: MuonConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> Muon:
        """Layers' matrices and factors of adapters by Muon; all else, convolutions too, by AdamW."""
        config = self.config
        whole = {key: getattr(config, key) for key in ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")}
        adam = {"betas": config.betas, "eps": config.eps}
        roles = ("matrix", "adapter_a", "adapter_b")
        return Muon(*whole_groups(groups, lambda group, *_: group.role in roles, whole, adam, config.weight_decay))


class Muon(WholeMatrixOptimizer):
    """The momentum of a matrix is spread like the matrix; its orthogonalisation is split over the ranks."""

    def gradient(self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """The (Nesterov) momentum."""
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        taken = parameter.grad.clone()
        mean, grad = local(state["momentum_buffer"]), local(taken)
        mean.lerp_(grad, 1 - group["momentum"])
        grad.copy_(grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean)
        return taken

    def update(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """All singular values near 1, times a factor for the shape."""
        update = whole["update"]
        rows, columns = update.shape[-2:]
        factor = math.sqrt(max(1, rows / columns)) if group["adjust_lr_fn"] == "original" else 0.0
        factor = factor or 0.2 * math.sqrt(max(rows, columns))
        update.copy_(orthogonal(update, group["ns_steps"])).mul_(factor)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz in bfloat16: about U V^T for a matrix (or a stack of them) U S V^T."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
