"""BAdam: Adam on one block of the model at a time (Luo et al. 2024, https://arxiv.org/abs/2404.02827).

Which block trains at a step is a function of the step, and its state begins anew whenever blocks are switched, so that
a run continues anywhere. What belongs to no layer (embedding, head, last norm) does not train, as in the authors'
package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import OptimizerContext, ParameterGroup, PlanError, RunContext, transformer_layers

from .configs import BAdamConfig
from .low_rank import adam_direction, bias_correction
from .whole import Whole, WholeMatrixOptimizer, seed_of, whole_groups


class BAdamFactory:
    """Makes a `LayerBAdam` or a `RatioBAdam`."""

    def __init__(self, config: BAdamConfig) -> None:
        self.config = config

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> LayerBAdam | RatioBAdam:
        """Blocks are the layers in which something trains. Raises PlanError for a block that is not there."""
        config, ratio = self.config, self.config.mode == "ratio"
        adam = {"betas": config.betas, "eps": config.eps}
        made, names = whole_groups(groups, lambda *_: ratio, adam, adam, config.weight_decay)
        blocks = blocks_of(names.values(), context.layers)
        for problem in self.against(blocks):
            raise PlanError(f"optim_config: {problem}")
        make = RatioBAdam if ratio else LayerBAdam
        return make(made, names, config, blocks, context)

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """A block that is not there."""
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return self.against(blocks_of(trained, [name for name, _ in transformer_layers(model)]))

    def against(self, blocks: Sequence[object]) -> Iterator[str]:
        """What speaks against so many blocks."""
        start = self.config.start_block
        if start is not None and start >= len(blocks):
            yield f"start_block: found {start}, allowed is 0 to {len(blocks) - 1}, as so many blocks train"


def blocks_of(names: Iterable[str], layers: Sequence[str]) -> list[tuple[str, frozenset[str]]]:
    """The name of each layer in which something trains, with the names of what does; all as one without layers."""
    names = list(names)
    found = [(layer, frozenset(name for name in names if name.startswith(f"{layer}."))) for layer in layers]
    return [block for block in found if block[1]] or [("all parameters", frozenset(names))]


class BlockOptimizer(WholeMatrixOptimizer):
    """What both modes share: when a block ends, and its state with it."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str], config: BAdamConfig,
        blocks: Sequence[tuple[str, frozenset[str]]], context: OptimizerContext,
    ) -> None:  # fmt: skip
        super().__init__(groups, names)
        self.config, self.blocks, self.seed = config, blocks, context.seed
        self.new = context.new.difference(*(members for _, members in blocks))
        """Parameters outside of all blocks that started from no file, such as a value head: they always train."""
        self.trained = {names[id(one)]: one for group in self.param_groups for one in group["params"]}

    def begin(self, step: int) -> int:
        """Empty the state where the 0-based `step` is the first of a block; the number of that block, from 0."""
        interval = self.config.switch_interval
        if step == 0 or (interval > 0 and step % interval == 0):
            self.state.clear()
        return step // interval if interval > 0 else 0

    def train_only(self, active: frozenset[str]) -> None:
        """Switch off all other parameters for a step."""
        for name, parameter in self.trained.items():
            parameter.requires_grad_(name in active or name in self.new)
            if not parameter.requires_grad:
                parameter.grad = None


class LayerBAdam(BlockOptimizer):
    """AdamW on one layer at a time."""

    shown = -1

    def at_step(self, step: int) -> None:
        """Train the layer whose turn it is."""
        count = self.begin(step)
        name, members = self.blocks[self.block(count)]
        self.train_only(members)
        if self.config.verbose and count != self.shown and first_rank():
            inside = f": {', '.join(sorted(members))}" if self.config.verbose > 1 else ""
            print(f"badam: from step {step + 1} on {name} trains{inside}", file=sys.stderr)
        self.shown = count

    def block(self, count: int) -> int:
        """The layer that trains after so many switches."""
        number, start, mode = len(self.blocks), self.config.start_block, self.config.switch_mode
        if mode == "fixed":
            return start or 0
        if mode == "ascending":
            return ((start or 0) + count) % number
        if mode == "descending":
            return ((number - 1 if start is None else start) - count) % number
        if start is not None and count == 0:
            return start
        turn, place = divmod(count - (start is not None), number)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "blocks", turn))
        return int(torch.randperm(number, generator=generator)[place])


class RatioBAdam(BlockOptimizer):
    """Adam on a share of each layer's numbers at a time."""

    count = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn: dict[str, tuple[int, Tensor]] = {}
        """For parameters that are whole on this rank, the numbers drawn after so many switches."""

    def at_step(self, step: int) -> None:
        """Train all layers, other numbers of them after each switch."""
        self.count = self.begin(step)
        self.train_only(frozenset().union(*(members for _, members in self.blocks)))

    def state_shapes(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Means of the gradient's chosen numbers."""
        chosen = int(shape.numel() * self.config.update_ratio)
        return {"exp_avg": (chosen,), "exp_avg_sq": (chosen,)}

    def update(self, name: str, step: int, whole: Whole, group: Mapping[str, Any]) -> None:
        """Adam's direction where numbers are chosen, and nothing elsewhere."""
        flat, chosen = whole["update"].flatten(), len(whole["exp_avg"])
        places = self.places(name, flat, chosen)
        direction = adam_direction(flat[places], whole, group) * bias_correction(step, group)
        whole["update"].copy_(torch.zeros_like(flat).index_copy(0, places, direction).view_as(whole["update"]))

    def places(self, name: str, flat: Tensor, chosen: int) -> Tensor:
        """Which numbers of a parameter train now: the next ones as they lie, or in an order that is drawn once."""
        numbers = flat.numel()
        places = (torch.arange(chosen, device=flat.device) + self.count * chosen) % numbers
        if self.config.mask_mode == "adjacent":
            return places
        if (kept := self.drawn.get(name)) is None or kept[0] != self.count:
            generator = torch.Generator().manual_seed(seed_of(self.seed, name))
            order = torch.randperm(numbers, generator=generator)
            kept = self.drawn[name] = (self.count, order[places.cpu()].to(flat.device))
        return kept[1]


def first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
