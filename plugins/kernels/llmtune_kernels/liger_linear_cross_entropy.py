"""Liger's fused output head and cross-entropy: like `linear_cross_entropy`, the loss and its gradient in one kernel.

Heads that are not a plain linear layer, and models that do something to their logits, go the way of
`linear_cross_entropy`, which knows them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import ModelEdit, RunContext
from llmtune_kernels.linear_cross_entropy import is_plain, linear_cross_entropy
from llmtune_kernels.spec import KernelSpec


def liger_linear_cross_entropy(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Summed cross-entropy of `head(hidden_ND)` against `targets_N`, a float32 scalar."""
    plain = is_plain(head) and not hasattr(head.weight, "full_tensor")
    if transform is not None or not plain or not hidden_ND.shape[0] or not hidden_ND.is_cuda:
        return linear_cross_entropy(hidden_ND, head, targets_N, transform)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # pyrefly: ignore[missing-import]

    loss = liger_fused_linear_cross_entropy(
        hidden_ND, head.weight, targets_N, bias=head.bias, reduction="sum", accum_dtype=torch.float32
    )
    return loss.float()


def _suits(model: Any, context: RunContext) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config.get_text_config()
    if type(head) is not nn.Linear:
        return "its output head is not a plain linear layer"
    if getattr(config, "final_logit_softcapping", None):
        return "it soft-caps its logits"
    if getattr(config, "logit_scale", None) not in (None, 1) or getattr(config, "logits_scaling", None) not in (
        None,
        1,
    ):
        return "it scales its logits"
    return None


def _apply(model: Any, context: RunContext) -> ModelEdit:
    line = "liger_linear_cross_entropy: used for the loss"
    return ModelEdit(ops={"linear_cross_entropy": liger_linear_cross_entropy}, report=[line])


SPEC = KernelSpec(
    id="liger_linear_cross_entropy",
    op="linear_cross_entropy",
    summary="Liger's fused output head and loss",
    models="models with a plain linear output head and nothing done to the logits",
    devices=frozenset({"cuda"}),
    package="liger_kernel",
    extra="llmtune-kernels[liger]",
    suits=_suits,
    apply=_apply,
    train_only=True,
)
