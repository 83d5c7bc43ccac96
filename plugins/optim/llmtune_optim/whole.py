"""Optimisers whose update of a matrix needs all of it, on one rank or spread over many.

On several ranks each matrix of a batch goes to another rank as a whole, is worked on there, and comes back in pieces:
the work is split, not repeated, and each number is computed as on one rank. What is sent are the gradient and the
update, each once, and state that the work needs whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtune import ParameterGroup

from .groups import loss_of, require_parameters

Whole = dict[str, Tensor]
"""The tensors that belong to one matrix, whole: its `update`, at first the gradient, and its state."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def seed_of(*parts: object) -> int:
    """A seed that depends on these alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "little")


def spread_zeros(parameter: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose first dimension is spread over the ranks that the parameter is spread over."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in parameter.placements]
    made = zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
    return made.to(local(parameter).device)  # offloaded shards are elsewhere than the mesh's device


def ranks_of(parameter: Tensor) -> int:
    """How many ranks share the work on parameters like this one."""
    if not isinstance(parameter, DTensor):
        return 1
    sharded = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return parameter.device_mesh.size(sharded[0]) if len(sharded) == 1 else 1


def on_whole(rows: Sequence[Mapping[str, Tensor]], work: Callable[[int, Whole], None]) -> None:
    """Call `work(number, tensors)` for each row where its tensors are whole; it changes them in place.

    Rows are alike in keys, shapes and placements. Collective: all ranks call it with the same rows, of which each works
    on some.
    """
    first = next(iter(rows[0].values()))
    if not isinstance(first, DTensor):
        for number, row in enumerate(rows):
            work(number, dict(row))
        return
    if sum(not placement.is_replicate() for placement in first.placements) != 1:
        for number, row in enumerate(rows):
            repeat_on_whole(row, lambda tensors, number=number: work(number, tensors))
        return
    gathered = {key: gather([row[key] for row in rows]) for key in rows[0]}
    mine = {key: tensor.to_local() for key, tensor in gathered.items()}
    start = first_row(gathered["update"])
    for index in range(len(mine["update"])):
        work(start + index, {key: tensor[index] for key, tensor in mine.items()})
    for key, tensor in gathered.items():
        back = tensor.redistribute(placements=stacked(rows[0][key])).to_local()
        for row, value in zip(rows, back, strict=True):
            local(row[key]).copy_(value)


def repeat_on_whole(row: Mapping[str, Any], work: Callable[[Whole], None]) -> None:
    """The same for tensors that are cut in two ways, by tensor parallelism and by sharding: every rank does it all."""
    tensors = {key: tensor.full_tensor().clone() for key, tensor in row.items()}
    work(tensors)
    for key, tensor in row.items():
        # Private to torch, and the one function that knows nested shards.
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        local(tensor).copy_(tensors[key][box])


def stacked(tensor: Any) -> list[Any]:
    """Placements of several such tensors on top of each other."""
    return [Replicate() if placement.is_replicate() else Shard(placement.dim + 1) for placement in tensor.placements]


def gather(tensors: Sequence[Any]) -> DTensor:
    """The tensors on top of each other, each whole on one rank."""
    one = tensors[0]
    shape = torch.Size((len(tensors), *one.shape))
    stack = DTensor.from_local(
        torch.stack([tensor.to_local() for tensor in tensors]), one.device_mesh, stacked(one), run_check=False,
        shape=shape, stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip
    apart = [Replicate() if placement.is_replicate() else Shard(0) for placement in one.placements]
    return stack.redistribute(placements=apart)


def first_row(stack: DTensor) -> int:
    """The number of the first row of a stack that this rank has whole."""
    rows, start = stack.shape[0], 0
    coordinate = stack.device_mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(stack.placements):
        if not placement.is_replicate():
            each = -(-rows // stack.device_mesh.size(dim))
            begin = min(rows, each * coordinate[dim])
            start, rows = start + begin, min(rows, begin + each) - begin
    return start


class WholeMatrixOptimizer(torch.optim.Optimizer):
    """Some matrices by a method that sees them whole, all other parameters by AdamW.

    Groups have `whole`, which says by which, and for AdamW `betas` and `eps`. State of a matrix is a step counter and
    what `state_shapes` names, spread over the parameter's ranks.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
        super().__init__([dict(group) for group in groups], {})
        self.names = names
        """Of parameters, by `id`."""
        self.groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}

    def state_shapes(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the state that goes where the matrix is whole, by name."""
        return {}

    def gradient(self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """A tensor of its own, spread like the parameter, that takes the gradient's part in `update`."""
        assert parameter.grad is not None
        return parameter.grad.clone()

    def update(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """Turn `whole["update"]` from a gradient into what the learning rate is multiplied by; bring state up to date.

        `step` counts from 1. No number may depend on anything else: each matrix is updated on one rank only.
        """
        raise NotImplementedError("this optimiser has no groups of whole matrices")

    def empty_state(self, parameter: nn.Parameter, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `llmtune.SpreadsState`."""
        return spread_zeros(parameter, shape, dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            self.update_parameters(found, group)
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: nn.Parameter) -> None:
        """See `llmtune.StepsEach`."""
        self.update_parameters([parameter], self.groups[id(parameter)])

    def update_parameters(self, found: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """One update of these members of a group."""
        for parameter in found if not group["whole"] else ():
            adamw_step(parameter, self.state[parameter], group)
        for batch in batches(found) if group["whole"] else ():
            self._update_whole(batch, group)

    def _update_whole(self, batch: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        rows = []
        for parameter in batch:
            state, shapes = self.state[parameter], self.state_shapes(parameter.shape, group)
            if "step" not in state:
                state["step"] = 0
                state |= {key: spread_zeros(parameter, shape, parameter.dtype) for key, shape in shapes.items()}
            state["step"] += 1
            rows.append({"update": self.gradient(parameter, state, group), **{key: state[key] for key in shapes}})

        def work(number: int, whole: Whole) -> None:
            parameter = batch[number]
            self.update(self.names[id(parameter)], self.state[parameter]["step"], whole, group)

        on_whole(rows, work)
        for parameter, row in zip(batch, rows, strict=True):
            here = local(parameter.detach())
            here.mul_(1 - group["lr"] * group["weight_decay"])
            here.add_(local(row["update"]), alpha=-group["lr"])


def batches(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters that are alike, as many at a time as there are ranks to work on them."""

    def kind(parameter: Any) -> tuple[Any, ...]:
        spread = (hash(parameter.device_mesh), str(parameter.placements)) if isinstance(parameter, DTensor) else ()
        return (tuple(parameter.shape), str(parameter.dtype), *spread)

    for _, alike in groupby(sorted(parameters, key=kind), kind):
        members = list(alike)
        size = ranks_of(members[0])
        yield from (members[start : start + size] for start in range(0, len(members), size))


def adamw_step(parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """torch's AdamW for one parameter, number by number (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""
    if not state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    state["step"] += 1
    assert parameter.grad is not None
    here, grad = local(parameter.detach()), local(parameter.grad)
    mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
    beta1, beta2 = group["betas"]
    here.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    here.addcdiv_(mean, (square.sqrt() / bias2**0.5).add_(group["eps"]), value=-group["lr"] / bias1)


def whole_groups(
    groups: Sequence[ParameterGroup], chosen: Callable[[ParameterGroup, str, nn.Parameter], bool],
    whole: Mapping[str, Any], adam: Mapping[str, Any], weight_decay: float,
) -> tuple[list[dict[str, Any]], dict[int, str]]:  # fmt: skip
    """Groups for torch, each split into those that are `chosen` to be updated whole and the rest; and the names.

    `whole` and `adam` are the settings of the two kinds.
    """
    require_parameters(groups)
    made = []
    for group in groups:
        for is_whole, settings in ((True, whole), (False, adam)):
            members = [p for name, p in group.parameters if chosen(group, name, p) == is_whole]
            common = {"lr": group.lr, "weight_decay": weight_decay if group.decays else 0.0, "whole": is_whole}
            if members:
                made.append({"params": members, **common, **settings})
    names = {id(parameter): name for group in groups for name, parameter in group.parameters}
    return made, names
