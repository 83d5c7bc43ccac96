"""The recipe's keys of `dist_config: {name: fsdp2}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llmtune.contract.schema import Ge


@dataclass(frozen=True, kw_only=True)
class Fsdp2Config:
    """Keys of `dist_config: {name: fsdp2}`."""

    dp_replicate_size: Annotated[int, Ge(1)] = 1
    """Copies of the model (HSDP): parameters are sharded within a copy, gradients are summed over all. Set it to the
    number of machines to keep the gathering of parameters inside each."""
    tp_size: Annotated[int, Ge(1)] = 1
    """Neighbouring ranks that compute a batch together, each with its share of every layer's matrix products (tensor
    parallelism), for layers too large for one rank. Keep them inside a machine."""
    ep_size: Annotated[int, Ge(1)] = 1
    """Neighbouring ranks that hold different experts of a mixture-of-experts model and send each other tokens (expert
    parallelism). A multiple of `tp_size`."""
    cp_size: Annotated[int, Ge(1)] = 1
    """Neighbouring ranks that share the rows of a batch, each computing a piece of every row (context parallelism), for
    rows too long for one rank. Needs `kernel_config: auto`; has to divide the number of attention heads."""
    reshard_after_forward: bool | int = True
    """Free a layer's gathered weights after its forward pass (ZeRO-3); false keeps them until its backward pass
    (ZeRO-2); a whole number reshards to groups of that many ranks."""
    accumulate_sharded: bool = False
    """Reduce gradients after every micro-batch instead of once a step: they are held as shards between micro-batches,
    not whole, for that many times the communication. For training all weights of a large model."""
    offload_params: bool = False
    """Keep shards, gradients and optimiser state in host memory."""
    pin_memory: bool = True
    """Page-locked host memory for `offload_params`: faster copies, memory that cannot be swapped."""
