"""Liger's fused `silu(gate) * up`, which keeps neither the activated gate nor the product for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llmtune import ModelEdit, RunContext
from llmtune_kernels.spec import KernelSpec, modules_of, swap_forward, where

CLASSES = dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Olmo2MLP"))
"""MLPs of transformers that compute `down_proj(act(gate_proj(x)) * up_proj(x))`."""

SiluMul = Callable[[Tensor, Tensor], Tensor]
"""`f(gate, up)`: Liger's `liger_swiglu`."""


def replace_mlps(model: nn.Module, silu_mul: SiluMul) -> list[tuple[str, nn.Module]]:
    """Route the known MLPs through `silu_mul`. Their projections stay, adapted or quantised as they are."""
    found = _mlps(model)
    for _, mlp in found:
        swap_forward(mlp, _forward(silu_mul))
    return found


@functools.cache
def _forward(silu_mul: SiluMul) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor, /) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    return forward


def _mlps(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, mlp) for name, mlp in modules_of(model, CLASSES) if mlp.config.hidden_act in ("silu", "swish")]


def _suits(model: nn.Module, context: RunContext) -> str | None:
    return None if _mlps(model) else "none of its MLPs is a known gated one with SiLU"


def _apply(model: nn.Module, context: RunContext) -> ModelEdit:
    from liger_kernel.transformers.functional import liger_swiglu  # pyrefly: ignore[missing-import]

    return ModelEdit(report=[f"liger_swiglu: used in {where(replace_mlps(model, liger_swiglu))}"])


SPEC = KernelSpec(
    id="liger_swiglu",
    op="swiglu",
    summary="Liger's fused SiLU and product in gated MLPs",
    models="Llama, Mistral, Qwen 2 and 3 (dense), SmolLM 3, OLMo 2, with SiLU",
    devices=frozenset({"cuda"}),
    package="liger_kernel",
    extra="llmtune-kernels[liger]",
    suits=_suits,
    apply=_apply,
)
