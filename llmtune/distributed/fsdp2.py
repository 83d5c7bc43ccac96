"""Spread a model over ranks with FSDP2. The only importer of `torch.distributed.fsdp`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from llmtune.contract.records import ParallelDims, RunContext
from llmtune.distributed.config import Fsdp2Config
from llmtune.distributed.expert_parallel import spread_experts
from llmtune.distributed.mesh import divided

if TYPE_CHECKING:
    from torch import nn


class Fsdp2:
    """One FSDP2 group per transformer layer, adapters inside their layer's group, and one for the rest."""

    def __init__(self, config: Fsdp2Config) -> None:
        self.config = config
        self.in_host_memory = config.offload_params
        self.keeps_weights = config.reshard_after_forward is False
        self.keeps_gradients = not config.accumulate_sharded

    def savings(self) -> dict[Literal["gradients", "host"], dict[str, Any]]:
        """Keys that save memory and are not set."""
        saving: dict[Literal["gradients", "host"], dict[str, Any]] = {}
        if self.keeps_gradients:
            saving["gradients"] = {"accumulate_sharded": True}
        if not self.in_host_memory:
            saving["host"] = {"offload_params": True}
        return saving

    def layout(self, ranks: int) -> ParallelDims:
        """Copies and groups as the keys say, and the rest of the ranks shards within each."""
        config = self.config
        replicate, context, tensor = config.dp_replicate_size, config.cp_size, config.tp_size
        shard = divided(ranks, {"dp_replicate_size": replicate, "cp_size": context, "tp_size": tensor})
        return ParallelDims(replicate=replicate, shard=shard, context=context, tensor=tensor, expert=config.ep_size)

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """Objections against this combination."""
        size = self.config.reshard_after_forward
        group = context.dims.shard * context.dims.context
        if not isinstance(size, bool) and (size < 1 or group % size):
            yield (
                f"reshard_after_forward is {size}, which does not divide the {group} ranks that parameters are sharded "
                "over; use true, false, or a divisor"
            )

    def apply(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any, context: RunContext) -> None:
        # Two dimensions are HSDP: sharded over the last, replicated over the first.
        replicated = "replicate" in mesh.mesh_dim_names
        options: dict[str, Any] = {"mesh": mesh["replicate", "shard"] if replicated else mesh["shard"]}
        # Without mixed precision nothing is cast; with it, what travels is `gather_dtype`, sums stay in float32.
        if context.gather_dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=context.gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if self.config.offload_params:
            pin = self.config.pin_memory and context.device == "cuda"
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=pin)
        if context.dims.expert > 1:
            self._shard_experts(root, mesh, context.dims, options)
        for layer in layers:
            fully_shard(layer, **options, reshard_after_forward=self.config.reshard_after_forward)
        fully_shard(root, **options, reshard_after_forward=False)

    def _shard_experts(self, root: Any, mesh: Any, dims: ParallelDims, options: dict[str, Any]) -> None:
        """Experts in groups of their own, over the ranks that hold the same ones."""
        for module, same in spread_experts(root.model, dims, mesh):
            fully_shard(
                module, **{**options, "mesh": same}, reshard_after_forward=bool(self.config.reshard_after_forward)
            )
            assert isinstance(module, FSDPModule)
            # Tokens of all batches have come to these experts: their gradients are sums over more batches than there
            # are ranks to average over. Divided by the number of batches they are means, like all others.
            module.set_gradient_divide_factor(float(dims.ranks // dims.tensor))
            if same.size(same.ndim - 1) > 1:
                # Else the backend divides, which gloo cannot and NCCL gets wrong in bfloat16 (pytorch issue 190747).
                # Where no two ranks of a copy hold the same experts FSDP2 divides itself, and would do it twice.
                module.set_force_sum_reduction_for_comms(True)

    def before_backward(self, root: nn.Module, last: bool) -> None:
        """Reduce gradients after the last micro-batch only, unless the recipe wants them sharded in between."""
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(last or self.config.accumulate_sharded)


def reshard(root: nn.Module) -> None:
    """Free what a forward pass without a backward one left gathered (the root's weights, at the least).

    Until then `named_parameters` gives the gathered copies: neither what the optimiser updates, nor what stays.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer for itself, in place: all layers of a kind share one compilation, and FSDP2's collectives stay
    between them. Before `Distribute.apply`, so that its hooks are not compiled."""
    for layer in layers:
        layer.compile()
