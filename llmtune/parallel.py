"""Spread a model over ranks with FSDP2. The only importer of `torch.distributed.fsdp`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.records import Situation

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Fsdp2Config:
    """Keys of `dist_config: {name: fsdp2}`."""

    reshard_after_forward: bool | int = True
    """Free a layer's gathered weights after its forward pass (ZeRO-3); false keeps them until its backward pass
    (ZeRO-2); a whole number reshards to groups of that many ranks."""
    offload_params: bool = False
    """Keep shards, gradients and optimiser state in host memory."""
    pin_memory: bool = True
    """Page-locked host memory for `offload_params`: faster copies, memory that cannot be swapped."""


class Fsdp2:
    """One FSDP2 group per transformer layer, adapters inside their layer's group, and one for the rest."""

    def __init__(self, config: Fsdp2Config) -> None:
        self.config = config

    def apply(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any, situation: Situation) -> None:
        import torch
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        options: dict[str, Any] = {"mesh": mesh}
        # Without mixed precision nothing is cast; with it, what travels is `gather_dtype`, sums stay in float32.
        if situation.gather_dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=situation.gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if self.config.offload_params and situation.device == "cuda":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.config.pin_memory)
        for layer in layers:
            fully_shard(layer, **options, reshard_after_forward=self.config.reshard_after_forward)
        fully_shard(root, **options, reshard_after_forward=False)


def reduce_only_last(root: nn.Module, last: bool) -> None:
    """Switch gradient reduction for the coming backward pass; accumulation needs one reduction a step."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(last)


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations."""
    # transformers renamed it in the course of version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
