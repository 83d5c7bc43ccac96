"""bitsandbytes' 8-bit AdamW, for plain parameters and for shards (DTensor)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import OptimizerContext, ParameterGroup, PlanError, RunContext

from . import AdamW8bitConfig
from .groups import loss_of, require_parameters, torch_groups
from .whole import local


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """bitsandbytes warns at import about optional CPU kernels for 4-bit products, which no optimiser uses."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


with quiet("bitsandbytes.backends.cpu.ops"):
    import bitsandbytes
    from bitsandbytes.functional import dequantize_blockwise

BLOCK = 256
"""Numbers that share a scale in bitsandbytes' optimisers."""
TABLES = ("dynamic", "udynamic")
"""bitsandbytes' code tables of the first and of the second moment."""


class AdamW8bitFactory:
    """Makes a `ShardedAdamW8bit`."""

    def __init__(self, config: AdamW8bitConfig) -> None:
        self.config = config

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """Paged states without CUDA."""
        return self.against(context.device)

    def against(self, device: str) -> Iterator[str]:
        """What speaks against parameters on a device."""
        if self.config.paged and device != "cuda":
            yield f"paged: found true, but parameters are on {device} and only CUDA pages; leave paged out"

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> ShardedAdamW8bit:
        """Groups by width of the states, too. Raises PlanError for paged states without CUDA."""
        config = self.config
        require_parameters(groups)
        for parameter in (parameter for group in groups for _, parameter in group.parameters):
            for problem in self.against(parameter.device.type):
                raise PlanError(f"optim_config: {problem}")
        split = []
        for bits in (8, 32):
            found = [(group, [pair for pair in group.parameters if self.bits(*pair) == bits]) for group in groups]
            of_width = [replace(group, parameters=members) for group, members in found if members]
            split += [group | {"bits": bits} for group in torch_groups(of_width, config.weight_decay)]
        return ShardedAdamW8bit(split, betas=config.betas, eps=config.eps, paged=config.paged)

    def bits(self, name: str, parameter: nn.Parameter) -> int:
        """Width of a parameter's states: by its full size, so that it does not depend on the number of ranks."""
        small = parameter.numel() < self.config.min_8bit_size
        return 32 if small or any(part in name for part in self.config.full_precision_names) else 8


class ShardedAdamW8bit(torch.optim.Optimizer):
    """AdamW8bit over this rank's part of each parameter.

    `state[parameter]` holds `step` (int), `state1` and `state2` (uint8 codes, or float32 where the group's `bits` is
    32) in the shape of this rank's part and, for codes, `absmax1` and `absmax2` (float32, one per block of 256).
    Entries assigned from outside are taken over at the next step, so putting saved ones back continues exactly. The
    code tables are constants of bitsandbytes and not part of the state. A rank whose part of a parameter is empty has
    no state for it. Blocks begin anew on every rank: other numbers of ranks round alike only where parts are whole
    blocks. `unpack` and `pack` carry a run to another number of ranks; they round once, and only where blocks move.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], *, betas: tuple[float, float], eps: float, paged: bool
    ) -> None:
        super().__init__(
            [dict(group) for group in groups], {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0}
        )
        self._inner = [
            bitsandbytes.optim.AdamW8bit(
                [nn.Parameter(local(parameter.detach())) for parameter in group["params"]],
                min_8bit_size=0 if group["bits"] == 8 else sys.maxsize,
                is_paged=paged,
            )
            for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            self._step_group(group, inner)
        return loss

    def _step_group(self, group: dict[str, Any], inner: Any) -> None:
        inner.param_groups[0].update({key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
        moved = []
        for parameter, part in zip(group["params"], inner.param_groups[0]["params"], strict=True):
            here = local(parameter.detach())
            if parameter.grad is None or not here.numel():
                continue
            # Taken anew at each step, because sharding may swap a parameter's storage (`to_empty`, offloading).
            part.data = here.contiguous()
            part.grad = local(parameter.grad).contiguous()
            if self.state[parameter]:
                take_over(inner, part, self.state[parameter])
            moved.append((parameter, part, here))
        inner.step()
        for parameter, part, here in moved:
            part.grad = None
            if part.data_ptr() != here.data_ptr():
                here.copy_(part)
            self.state[parameter] = {key: value for key, value in inner.state[part].items() if "qmap" not in key}

    def unpack(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes of one piece as float32; states that are float32 already, as they are."""
        values = {}
        for number, table in enumerate(TABLES, 1):
            value = state[f"state{number}"]
            if value.dtype == torch.uint8:
                absmax = state[f"absmax{number}"]
                value = dequantize_blockwise(value, absmax=absmax, code=self._table(table, value), blocksize=BLOCK)
            values[f"state{number}"] = value.float()
        return values

    def pack(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse, in the width of the parameter's group. Blocks that start where they did keep their codes."""
        bits = next(g["bits"] for g in self.param_groups if any(parameter is member for member in g["params"]))
        if bits == 32:
            return dict(values)
        state = {}
        for number, table in enumerate(TABLES, 1):
            value = values[f"state{number}"]
            codes, absmax = to_codes(value, self._table(table, value))
            state |= {f"state{number}": codes, f"absmax{number}": absmax}
        return state

    def _table(self, name: str, like: Tensor) -> Tensor:
        """bitsandbytes' values of the 256 codes."""
        return self._inner[0].name2qmap[name].to(like.device)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but codes stay codes: torch would cast them to the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = dict(state)


def to_codes(value: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes in the shape of `value` and a scale for each block of 256, such that what was codes before stays.

    bitsandbytes' own function takes a block's largest magnitude as its scale. The signed table ends at -0.993, so a
    block that ended there would shrink by 0.7 % each time.
    """
    blocks = nn.functional.pad(value.float().flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
    absmax = torch.maximum(blocks.amax(1) / table[-1], blocks.amin(1) / table[0].clamp(max=-1e-3))
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: value.numel()].view(value.shape), absmax


def take_over(inner: Any, part: nn.Parameter, state: Mapping[str, Any]) -> None:
    """Give bitsandbytes the `state` of `part`, copied into buffers of its own unless it already holds them."""
    held = inner.state[part]
    for key, value in state.items():
        if key == "step":
            held[key] = int(value)
        elif held.get(key) is value:
            continue
        elif key.startswith("state"):
            held[key] = inner.get_state_buffer(part, dtype=value.dtype)
            held[key].copy_(local(value).reshape(part.shape))
        else:
            held[key] = local(value).reshape(-1).to(part.device, copy=True)
    if state["state1"].dtype == torch.uint8 and "qmap1" not in held:
        for key, table in zip(("qmap1", "qmap2"), TABLES, strict=True):
            inner.name2qmap[table] = inner.name2qmap[table].to(part.device)
            held[key] = inner.name2qmap[table]
