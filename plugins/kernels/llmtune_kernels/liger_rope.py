"""Liger's fused rotary embedding of queries and keys.

transformers' attention modules call a function of their own module for it, which could only be exchanged for every
model of the process at once. So the attention module's forward is written out here for the classes in the table; the
tests hold it to be the same, to the last bit, as theirs with the plain rotation.

Shapes: B batch, T tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llmtune import ModelEdit, RunContext
from llmtune_kernels.spec import KernelSpec, modules_of, swap_forward, where

CLASSES = dict.fromkeys(("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"))
"""Attention classes of transformers with the forward below."""

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`f(query_BHTD, key_BHTD, cos_BTD, sin_BTD)`: Liger's `liger_rope`, transformers' `apply_rotary_pos_emb`."""


def replace_attention(model: nn.Module, rotate: Rotate) -> list[tuple[str, nn.Module]]:
    """Let the known attention modules rotate with `rotate`. Returns them with their names."""
    found = modules_of(model, CLASSES)
    for _, attention in found:
        swap_forward(attention, _forward(rotate))
    return found


@functools.cache
def _forward(rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape_BT = hidden_states.shape[:-1]
        heads_BTHD = (*shape_BT, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads_BTHD), self.k_proj(hidden_states).view(heads_BTHD)
        value = self.v_proj(hidden_states).view(heads_BTHD).transpose(1, 2)
        if hasattr(self, "q_norm"):  # Qwen 3 norms each head
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        cache = past_key_values if cache is None else cache  # transformers renamed it in the course of version 5
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        eager = sys.modules[type(self).plain_class.__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        arguments |= _window(self)
        output, scores = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **arguments
        )
        return self.o_proj(output.reshape(*shape_BT, -1).contiguous()), scores

    return forward


def _window(attention: Any) -> dict[str, int | None]:
    """Llama has no window, Mistral has one for all layers, Qwen's belongs to the layer."""
    match type(attention).plain_class.__name__:
        case "LlamaAttention":
            return {}
        case "MistralAttention":
            return {"sliding_window": getattr(attention.config, "sliding_window", None)}
    return {"sliding_window": attention.sliding_window}


def _suits(model: Any, context: RunContext) -> str | None:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if not modules_of(model, CLASSES):
        return "its attention is not of a known class"
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) not in (None, 1.0):
        return "it rotates a part of each head only"
    return None


def _apply(model: nn.Module, context: RunContext) -> ModelEdit:
    from liger_kernel.transformers.functional import liger_rope  # pyrefly: ignore[missing-import]

    return ModelEdit(report=[f"liger_rope: used in {where(replace_attention(model, liger_rope))}"])


SPEC = KernelSpec(
    id="liger_rope",
    op="rope",
    summary="Liger's fused rotary embedding of queries and keys",
    models="Llama, Mistral, Qwen 2 and 3 (dense)",
    devices=frozenset({"cuda"}),
    package="liger_kernel",
    extra="llmtune-kernels[liger]",
    suits=_suits,
    apply=_apply,
)
