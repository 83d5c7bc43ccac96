"""Which number types a run computes, stores and communicates in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """`compute`: activations and frozen weights. `trainable`: stored trainable weights. `autocast`: mixed precision."""

    compute: torch.dtype
    trainable: torch.dtype
    autocast: bool
    scaled: bool = False
    """Whether gradients need loss scaling (float16 only)."""

    @property
    def name(self) -> str:
        kind = str(self.compute).removeprefix("torch.")
        return f"{kind} mixed with float32" if self.autocast else kind


def choose_precision(
    device: torch.device, bf16: bool | None, fp16: bool | None, pure_bf16: bool, capable: bool | None = None
) -> Precision:
    """What the recipe asks for; where it asks for nothing, what is fastest and sound on the device.

    `capable` says whether a device that is only described has bfloat16 units; None asks torch about this machine's.

    A GPU from Ampere on gets bfloat16 mixed with float32. A CPU gets float32: without AMX units its float32
    matrix products run about twice as fast as bfloat16.
    """
    import torch

    if capable is None:
        capable = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if (bf16 or pure_bf16) and not capable:
        key = "bf16" if bf16 else "pure_bf16"
        raise PlanError(f"{key}: this GPU has no bfloat16 units; use fp16: true, or leave all three keys out")
    if pure_bf16:
        return Precision(torch.bfloat16, torch.bfloat16, autocast=False)
    if bf16 or (bf16 is None and not fp16 and device.type == "cuda" and capable):
        return Precision(torch.bfloat16, torch.float32, autocast=True)
    if fp16:
        return Precision(torch.float16, torch.float32, autocast=True, scaled=True)
    return Precision(torch.float32, torch.float32, autocast=False)


def stored_dtype(precision: Precision, wish: str | None) -> torch.dtype:
    """Type of trainable parameters, after a plugin's `store_trainable`; without autocast there is only one type."""
    import torch

    if not precision.autocast:
        return precision.trainable
    match wish:
        case "float32":
            return torch.float32
        case "compute":
            return precision.compute
    return precision.trainable


def torch_dtype(name: str, config: Any) -> torch.dtype:
    """`infer_dtype`: a name, or `auto` for the type the checkpoint declares (float32 becomes bfloat16 on a GPU)."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    declared = getattr(config, "dtype", None) or torch.float32
    if declared == torch.float32 and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return declared
