"""Liger's fused RMS norm.

Norms that look alike differ: the weight may be `w` or `1 + w`, and the product with it may be rounded to the input's
type before or after. The table says which class is which; classes that are not in it keep their own code.
Liger: https://arxiv.org/abs/2410.10989
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmtune import ModelEdit, RunContext
from llmtune_kernels.spec import KernelSpec, modules_of, swap_forward, transformers_class, where


@dataclass(frozen=True)
class Variant:
    """`(offset + weight) * x / rms(x)`."""

    offset: float
    """Added to the weight."""
    casting: str
    """`llama`: x / rms(x) is rounded to the input's type, then multiplied. `gemma`: float32 until the end."""


LLAMA = Variant(0.0, "llama")
GEMMA = Variant(1.0, "gemma")
OLMO = Variant(0.0, "gemma")

VARIANTS = {
    "LlamaRMSNorm": LLAMA,
    "MistralRMSNorm": LLAMA,
    "MixtralRMSNorm": LLAMA,
    "Ministral3RMSNorm": LLAMA,
    "Qwen2RMSNorm": LLAMA,
    "Qwen2MoeRMSNorm": LLAMA,
    "Qwen3RMSNorm": LLAMA,
    "Qwen3MoeRMSNorm": LLAMA,
    "Phi3RMSNorm": LLAMA,
    "GraniteRMSNorm": LLAMA,
    "SmolLM3RMSNorm": LLAMA,
    "GemmaRMSNorm": GEMMA,
    "Gemma2RMSNorm": GEMMA,
    "Gemma3RMSNorm": GEMMA,
    "Olmo2RMSNorm": OLMO,
    "Olmo3RMSNorm": OLMO,
}
"""Classes of transformers and what they compute."""

RmsNorm = Callable[[Tensor, Tensor, float, float, str, bool], Tensor]
"""`f(x, weight, eps, offset, casting, in_place)`: Liger's `liger_rms_norm`."""


def replace_norms(model: nn.Module, rms_norm: RmsNorm) -> list[tuple[str, nn.Module]]:
    """Route every known norm of `model` through `rms_norm`. Returns them with their names."""
    found = modules_of(model, VARIANTS)
    for _, norm in found:
        swap_forward(norm, _forward(rms_norm, VARIANTS[transformers_class(norm)]))
    return found


@functools.cache
def _forward(rms_norm: RmsNorm, variant: Variant) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor, /) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        # Never in place: Gemma's residual needs the gradient that in-place code would overwrite.
        return rms_norm(hidden_states, self.weight, eps, variant.offset, variant.casting, False)

    return forward


def _suits(model: nn.Module, context: RunContext) -> str | None:
    return None if modules_of(model, VARIANTS) else "none of its norms is known to compute what Liger's does"


def _apply(model: nn.Module, context: RunContext) -> ModelEdit:
    from liger_kernel.transformers.functional import liger_rms_norm  # pyrefly: ignore[missing-import]

    return ModelEdit(report=[f"liger_rms_norm: used in {where(replace_norms(model, liger_rms_norm))}"])


SPEC = KernelSpec(
    id="liger_rms_norm",
    op="rms_norm",
    summary="Liger's fused RMS norm, forward and backward in one pass each",
    models="Llama, Mistral, Mixtral, Qwen 2 and 3, Phi 3, Granite, SmolLM 3, Gemma 1 to 3, OLMo 2 and 3",
    devices=frozenset({"cuda"}),
    package="liger_kernel",
    extra="llmtune-kernels[liger]",
    suits=_suits,
    apply=_apply,
)
