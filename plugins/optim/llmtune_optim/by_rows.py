"""Optimisers that keep a few numbers for each row of a matrix: Adam-mini and Adafactor.

Adam-mini: Zhang et al. 2024, https://arxiv.org/abs/2406.16793. Adafactor: Shazeer & Stern 2018,
https://arxiv.org/abs/1804.04235.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from llmtune import OptimizerContext, ParameterGroup

from .configs import AdafactorConfig, AdamMiniConfig
from .groups import loss_of, require_parameters, torch_groups
from .whole import adamw_step, local

BY_HEAD = ("q_proj", "k_proj", "wq", "wk", "query", "key")
"""Layers whose rows belong to heads, by part of their name, as in the authors' package."""


class AdamMiniFactory:
    """Makes an `AdamMini`."""

    def __init__(self, config: AdamMiniConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> AdamMini:
        """Rows of queries and keys of text layers share by head; those of all else stand alone."""
        require_parameters(groups)
        config, made = self.config, torch_groups(groups, self.config.weight_decay)
        heads: dict[int, int] = {}
        text = tuple(f"{layer}." for layer in context.text_layers)
        for torch_group, group in zip(made, groups, strict=True):
            torch_group["role"] = group.role
            for name, parameter in group.parameters:
                known = group.role == "matrix" and name.startswith(text)
                by_head = known and any(part in name.split(".") for part in BY_HEAD)
                if by_head and context.head_size and parameter.shape[0] % context.head_size == 0:
                    heads[id(parameter)] = parameter.shape[0] // context.head_size
        return AdamMini(made, {"betas": config.betas, "eps": config.eps}, heads)


class AdafactorFactory:
    """Makes an `Adafactor`."""

    def __init__(self, config: AdafactorConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> Adafactor:
        """All parameters alike; only matrices have rows and columns."""
        require_parameters(groups)
        return Adafactor(torch_groups(groups, self.config.weight_decay), dict(vars(self.config)))


class ByRows(torch.optim.Optimizer, ABC):
    """One parameter at a time, with state of its rows."""

    def empty_state(self, parameter: nn.Parameter, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `llmtune.SpreadsState`: each dimension is spread as the parameter's is, unless it is shorter."""
        if not isinstance(parameter, DTensor):
            return torch.zeros(shape, dtype=dtype, device=parameter.device)
        here = local(parameter.detach())
        same = [size == full for size, full in zip(shape, parameter.shape, strict=True)]
        dims = [getattr(placement, "dim", None) for placement in parameter.placements]
        placements = [
            placement if dim is not None and same[dim] else Replicate()
            for placement, dim in zip(parameter.placements, dims, strict=True)
        ]
        mine = [part if as_there else size for as_there, part, size in zip(same, here.shape, shape, strict=True)]
        return DTensor.from_local(
            torch.zeros(mine, dtype=dtype, device=here.device), parameter.device_mesh, placements, run_check=False,
            shape=torch.Size(shape), stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                self.update(parameter, self.state[parameter], group)
        return loss

    @abstractmethod
    def update(self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Update one parameter and its state in place."""


class AdamMini(ByRows):
    """State: `exp_avg` like the parameter, and `row_sq` (rows, 1), which has one value for all rows of a head; norms
    have one value for all of their numbers, biases Adam's own second moment."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: dict[str, Any], heads: Mapping[int, int]) -> None:
        super().__init__([dict(group) for group in groups], defaults)
        self.heads = heads
        """Number of heads of a parameter, by `id`."""

    def update(self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """AdamW, but for the mean of squares."""
        if group["role"] == "bias":
            return adamw_step(parameter, state, group)
        assert parameter.grad is not None
        if not state:
            shape = (*parameter.shape[:-1], 1) if parameter.dim() > 1 else tuple(parameter.shape)
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter)}
            state["row_sq"] = self.empty_state(parameter, "row_sq", shape, parameter.dtype)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        square, mean = state["row_sq"], local(state["exp_avg"])
        square.mul_(beta2).add_(like(self._blocks(parameter, parameter.grad.square()), square), alpha=1 - beta2)
        mean.lerp_(local(parameter.grad), 1 - beta1)
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        here = local(parameter.detach())
        here.mul_(1 - group["lr"] * group["weight_decay"])
        here.addcdiv_(mean, (local(square).sqrt() / bias2**0.5).add_(group["eps"]), value=-group["lr"] / bias1)
        return None

    def _blocks(self, parameter: nn.Parameter, squares: Tensor) -> Tensor:
        """The mean of squares of each block, once for each of its rows."""
        if parameter.dim() < 2:
            return whole(squares.mean()).expand(parameter.shape)
        rows = squares.mean(dim=-1, keepdim=True)
        if (heads := self.heads.get(id(parameter))) is None:
            return rows
        every = whole(rows).unflatten(0, (heads, -1)).mean(dim=1, keepdim=True)
        return every.expand(-1, parameter.shape[0] // heads, *every.shape[2:]).flatten(0, 1)


class Adafactor(ByRows):
    """State of a matrix: `row_sq` (rows, 1) and `column_sq` (1, columns); of a vector `exp_avg_sq`. With `beta1` also
    `exp_avg`. As transformers' Adafactor without a rate of its own."""

    def update(self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """The gradient over the root of the product of its rows' and columns' means, clipped."""
        grad, shape = parameter.grad, tuple(parameter.shape)
        assert grad is not None
        if not state:
            state["step"] = 0
            shapes = {"row_sq": (*shape[:-1], 1), "column_sq": (*shape[:-2], 1, shape[-1])}
            shapes = shapes if len(shape) > 1 else {"exp_avg_sq": shape}
            shapes |= {"exp_avg": shape} if group["beta1"] is not None else {}
            state |= {key: self.empty_state(parameter, key, size, parameter.dtype) for key, size in shapes.items()}
        state["step"] += 1
        rate = 1.0 - state["step"] ** group["decay_rate"]
        square = grad.square() + group["eps"][0]
        means = {"exp_avg_sq": square} if len(shape) < 2 else {
            "row_sq": square.mean(dim=-1, keepdim=True), "column_sq": square.mean(dim=-2, keepdim=True),
        }  # fmt: skip
        for key, value in means.items():
            state[key].mul_(rate).add_(like(value, state[key]), alpha=1.0 - rate)
        if len(shape) > 1:
            row, column = state["row_sq"], state["column_sq"]
            mean = like(row.mean(dim=-2, keepdim=True), column[..., :1])
            update = local(grad) * (local(row) / local(mean)).rsqrt() * local(column).rsqrt()
        else:
            update = local(grad) * local(state["exp_avg_sq"]).rsqrt()
        update = update / (root_mean_square(update, grad) / group["clip_threshold"]).clamp(min=1.0)
        if group["beta1"] is not None:
            update = local(state["exp_avg"]).mul_(group["beta1"]).add_(update, alpha=1.0 - group["beta1"])
        here = local(parameter.detach())
        if group["scale_parameter"]:
            update = update * root_mean_square(here, parameter).clamp(min=group["eps"][1])
        here.mul_(1 - group["lr"] * group["weight_decay"])
        here.add_(update, alpha=-group["lr"])


def root_mean_square(part: Tensor, of: Tensor) -> Tensor:
    """Of a tensor that is spread like `of`, and of which this rank holds `part`."""
    total = part.square().sum()
    if isinstance(of, DTensor):
        spread = [Replicate() if placement.is_replicate() else Partial() for placement in of.placements]
        total = DTensor.from_local(total, of.device_mesh, spread, run_check=False).full_tensor()
    return (total / of.numel()).sqrt()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, state: Tensor) -> Tensor:
    """`value`, on every rank the part that goes with its part of `state`."""
    if not isinstance(state, DTensor):
        return value
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, state.device_mesh, [Replicate()] * state.device_mesh.ndim, run_check=False)
    return value.redistribute(placements=state.placements)
