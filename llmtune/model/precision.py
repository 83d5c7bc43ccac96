"""Which number types a run computes, stores and communicates in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import PlanError
from llmtune.model.cpu_speed import cpu_speed

if TYPE_CHECKING:
    from llmtune.model.sizes import ModelSizes


CPU_TYPE = "LLMTUNE_CPU_DTYPE"
"""The environment variable that says `float32` or `bfloat16` where the CPU would be measured: for runs that must give
the same numbers on every machine."""
WORTH = 1.2
"""How many times as fast bfloat16 products must be to be chosen: casting takes some of the gain back."""


@dataclass(frozen=True)
class Precision:
    """`compute`: activations and frozen weights. `trainable`: stored trainable weights. `autocast`: mixed precision."""

    compute: torch.dtype
    trainable: torch.dtype
    autocast: bool
    scaled: bool = False
    """Whether gradients need loss scaling (float16 only)."""
    why: str = field(default="", compare=False)
    """The reason, where llmtune has chosen."""

    @property
    def name(self) -> str:
        """The types in words, for the plan."""
        kind = str(self.compute).removeprefix("torch.")
        return f"{kind} mixed with float32" if self.autocast else kind

    @property
    def keys(self) -> dict[str, bool]:
        """The recipe keys that name these types."""
        return {
            "bf16": self.autocast and not self.scaled,
            "fp16": self.scaled,
            "pure_bf16": not self.autocast and str(self.trainable) == "torch.bfloat16",
        }


def choose_precision(
    device: torch.device,
    bf16: bool | None,
    fp16: bool | None,
    pure_bf16: bool,
    sizes: ModelSizes,
    capable: bool | None = None,
) -> Precision:
    """The types that the recipe asks for; where it asks for nothing, what is fastest and sound on the device.

    `capable` says whether a GPU that is only described has bfloat16 units; None asks torch about this machine's. A GPU
    from Ampere on gets bfloat16 mixed with float32. A CPU gets what multiplies a model of these `sizes` fastest, which
    is measured. Mixed precision is sound in either case: weights that train, their updates and all sums stay float32.
    """
    if capable is None:
        capable = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if (bf16 or pure_bf16) and not capable:
        key = "bf16" if bf16 else "pure_bf16"
        raise PlanError(f"{key}: this GPU has no bfloat16 units; use fp16: true, or leave all three keys out")
    mixed = Precision(torch.bfloat16, torch.float32, autocast=True)
    if pure_bf16:
        return Precision(torch.bfloat16, torch.bfloat16, autocast=False)
    if bf16:
        return mixed
    if fp16:
        return Precision(torch.float16, torch.float32, autocast=True, scaled=True)
    plain = Precision(torch.float32, torch.float32, autocast=False)
    if bf16 is not None:
        return plain
    if device.type == "cuda":
        return mixed if capable else plain
    return _fastest_on_this_cpu(plain, mixed, sizes)


def _fastest_on_this_cpu(plain: Precision, mixed: Precision, sizes: ModelSizes) -> Precision:
    if wish := os.environ.get(CPU_TYPE):
        choices = {"float32": plain, "bfloat16": mixed}
        if wish not in choices:
            raise PlanError(f'{CPU_TYPE}: found "{wish}" in the environment, allowed are float32 and bfloat16')
        return replace(choices[wish], why=f"{CPU_TYPE} says so")
    speed = cpu_speed(sizes)
    figures = f"{speed.float32 / 1e9:,.0f} GFLOP/s in float32 and {speed.bfloat16 / 1e9:,.0f} in bfloat16"
    chosen = mixed if speed.bfloat16 > WORTH * speed.float32 else plain
    return replace(chosen, why=f"a core of this CPU multiplies matrices at {figures}")


def stored_dtype(precision: Precision, wish: str | None) -> torch.dtype:
    """Type of trainable parameters, after a plugin's `store_trainable`; without autocast there is only one type."""
    if not precision.autocast:
        return precision.trainable
    match wish:
        case "float32":
            return torch.float32
        case "compute":
            return precision.compute
    return precision.trainable


def torch_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """`infer_dtype` on `device`: a name, or `auto` for the type the checkpoint declares (on a GPU float32 becomes
    bfloat16)."""
    if name != "auto":
        return getattr(torch, name)
    declared = getattr(config, "dtype", None) or torch.float32
    if declared == torch.float32 and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return declared
