"""Activation checkpointing: what a layer keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Level = Literal["none", "selective", "full"]
"""What a layer computes again in its backward pass instead of keeping it."""


def checkpoint_activations(model: Any, kind: Level) -> None:
    """Let each transformer layer keep only its input (`full`), or the dearest results too (`selective`).

    The gradients are the same bit for bit: what is computed again is computed alike, dropout included.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = _keep_dear_results
    # transformers renamed it in the course of version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


HOST_COPIES: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Inputs of layers that wait in host memory, for whoever counts bytes."""


def offload_inputs(model: nn.Module) -> None:
    """Let the inputs that checkpointed layers keep for their backward pass wait in host memory.

    Only inputs: what a layer saves while it is computed again is used at once. Copies go through pinned memory on the
    stream that computes, so that nothing has to wait for them but what uses them. The gradients are the same bit for
    bit.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_offloaded, layer._gradient_checkpointing_func)


def _offloaded(checkpoint: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    # What is saved inside the layer goes to the checkpoint's own hooks, so that only its inputs come to these.
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _back):
        return checkpoint(*inputs, **more)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.device, tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    HOST_COPIES[id(copy)] = copy
    return tensor.device, copy


def _back(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor.to(device, non_blocking=True)


def _keep_dear_results() -> Any:
    """Contexts for one layer's forward pass and its repetition.

    Kept are attention results, which are dear for their size, and every other matrix product; all else is computed
    again. That is half of what no checkpointing keeps, for about half of what full checkpointing computes again.
    """
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable[..., Any]:
    attention, products = attention_ops(), {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    counts = {"forward": 0, "again": 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in attention:
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            run = "again" if context.is_recompute else "forward"
            counts[run] += 1
            if counts[run] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def attention_ops() -> set[torch._ops.OpOverload]:
    """torch's scaled dot product attention on every kind of device, where this torch has it."""
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
    return {getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)}
