"""Cross-entropy over the vocabulary without ever holding the logits of all positions.

At V = 49152 each position has 192 KiB of float32 logits, and plain cross-entropy holds three such matrices at its
peak. Here a few hundred positions go through head, loss and gradient together, and the gradients are finished in the
forward pass: the loss is a sum, so its gradients only have to be scaled in the backward pass, and nothing is computed
twice.

Shapes: N positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune import ModelEdit, RunContext
from llmtune_kernels.spec import KernelSpec

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits at once. Less makes the matrix products narrow: on a CPU, at V = 49152 and
D = 576, 8 MiB takes 1.3 times as long as 64 MiB, and more than 64 gains nothing."""

IGNORED = -100


def linear_cross_entropy(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Summed cross-entropy of `transform(head(hidden_ND))` against `targets_N`, a float32 scalar.

    Gradients reach `hidden_ND` and every parameter of `head` that trains. Targets of -100 do not count. The result
    can be differentiated once: its gradients are handed on, not kept.
    """
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if any(hasattr(weight, "full_tensor") for weight in head.parameters()):
        # A head that is itself sharded gathers its weight in its own forward, which has to run as a whole.
        return _sum_of_chunk(hidden_ND, head, targets_N, transform)
    learns = torch.is_grad_enabled() and (hidden_ND.requires_grad or bool(weights))
    if not learns:
        with torch.no_grad():
            parts = [
                _sum_of_chunk(hidden_ND[rows], head, targets_N[rows], transform)
                for rows in _chunks(hidden_ND, _vocabulary(head))
            ]
        return torch.stack(parts).sum() if parts else hidden_ND.new_zeros((), dtype=torch.float32)
    step = _closed_form if transform is None and is_plain(head) else _by_autograd
    return _ChunkedLoss.apply(hidden_ND, step, head, targets_N, transform, *weights)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and finished gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        step: Callable[..., tuple[Tensor, list[Tensor | None]]],
        head: nn.Module,
        targets_N: Tensor,
        transform: Callable[[Tensor], Tensor] | None,
        *weights: Tensor,
    ) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        total, gradients = step(hidden_ND.detach(), head, targets_N, transform, weights, wants_hidden)
        ctx.gradients = gradients
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy were handed on already: it has one backward pass")
        (hidden, *weights), ctx.gradients = ctx.gradients, None
        # In place: the head's gradient is as large as the head, 113 MB for 49152 x 576.
        scaled = [None if gradient is None else gradient.mul_(scale) for gradient in (hidden, *weights)]
        return scaled[0], None, None, None, None, *scaled[1:]


def _closed_form(
    hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor, _: None, weights: tuple[Tensor, ...], wants_hidden: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a plain linear head by hand: softmax minus one-hot, times weight or hidden state."""
    device = hidden_ND.device.type
    matmul = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    exact = torch.promote_types(matmul, torch.float32)
    weight_VD = head.weight.detach().to(matmul)
    bias_V = None if head.bias is None else head.bias.detach()
    total = torch.zeros((), dtype=exact, device=hidden_ND.device)
    grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
    grads = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    by_weight = {id(weight): grad for weight, grad in zip(weights, grads, strict=True)}
    grad_VD, grad_V = by_weight.get(id(head.weight)), by_weight.get(id(head.bias))
    buffers: dict[str, Tensor] = {}
    with torch.autocast(device, enabled=False):
        for rows in _chunks(hidden_ND, weight_VD.shape[0]):
            hidden_CD = hidden_ND[rows].to(matmul)
            logits_CV = _product(hidden_CD, weight_VD.t(), buffers, "logits")
            if bias_V is not None:
                logits_CV += bias_V
            loss, error_CV, counts_C1 = _loss_and_error(logits_CV, targets_N[rows], exact, buffers)
            total += loss
            if grad_V is not None:
                grad_V += (counts_C1.t() @ error_CV).squeeze(0)
            error_CV, counts_C1 = error_CV.to(matmul), counts_C1.to(matmul)
            if grad_ND is not None:
                grad_ND[rows] = (error_CV @ weight_VD).mul_(counts_C1)
            if grad_VD is not None and grad_VD.dtype == matmul:
                grad_VD.addmm_(error_CV.t(), hidden_CD * counts_C1)
            elif grad_VD is not None:
                grad_VD += error_CV.t() @ (hidden_CD * counts_C1)
    return total.float(), [grad_ND, *grads]


def _product(left: Tensor, right: Tensor, buffers: dict[str, Tensor], name: str) -> Tensor:
    """`left @ right` into a buffer that all chunks share: fresh memory costs the CPU a page fault each 4 KiB."""
    if name not in buffers:
        buffers[name] = left.new_empty(left.shape[0], right.shape[1])
    return torch.mm(left, right, out=buffers[name][: left.shape[0]])


def _loss_and_error(
    logits_CV: Tensor, targets_C: Tensor, exact: torch.dtype, buffers: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss; its gradient to the logits, softmax minus one-hot; and 1 or 0 (C, 1) for rows that count or not.

    Rows that do not count are left in the gradient: leaving them out of (C, D) products costs V/D times less.
    """
    if "scores" not in buffers:
        buffers["scores"] = torch.empty_like(logits_CV, dtype=exact)
    scores_CV = buffers["scores"][: logits_CV.shape[0]]
    torch.log_softmax(logits_CV, -1, dtype=exact, out=scores_CV)
    counts_C1 = targets_C.ne(IGNORED).unsqueeze(1).to(exact)
    index_C1 = targets_C.clamp_min(0).unsqueeze(1)
    loss = -(scores_CV.gather(1, index_C1) * counts_C1).sum()
    error_CV = scores_CV.exp_().scatter_add_(1, index_C1, torch.full_like(counts_C1, -1.0))
    return loss, error_CV, counts_C1


def _by_autograd(
    hidden_ND: Tensor,
    head: nn.Module,
    targets_N: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    weights: tuple[Tensor, ...],
    wants_hidden: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Any head (adapted, quantised, hooked) and any transform: autograd, one chunk after the other."""
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    grad_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
    grads = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    for rows in _chunks(hidden_ND, _vocabulary(head)):
        with torch.enable_grad():
            hidden_CD = hidden_ND[rows].requires_grad_(wants_hidden)
            loss = _sum_of_chunk(hidden_CD, head, targets_N[rows], transform)
        asked = [hidden_CD, *weights] if wants_hidden else list(weights)
        found = list(torch.autograd.grad(loss, asked, allow_unused=True))
        if grad_ND is not None:
            grad_ND[rows] = found.pop(0)
        for grad, part in zip(grads, found, strict=True):
            if part is not None:
                grad += part
        total += loss.detach()
    return total, [grad_ND, *grads]


def _sum_of_chunk(
    hidden_CD: Tensor, head: nn.Module, targets_C: Tensor, transform: Callable[[Tensor], Tensor] | None
) -> Tensor:
    logits_CV = head(hidden_CD)
    if transform is not None:
        logits_CV = transform(logits_CV)
    return F.cross_entropy(logits_CV.float(), targets_C, reduction="sum", ignore_index=IGNORED)


def is_plain(head: nn.Module) -> bool:
    """Whether `head(x)` is `x @ weight.T + bias` and nothing else."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and not hooked


def _vocabulary(head: nn.Module) -> int:
    """Logits of one position: the longest side of the head's matrices, whatever wraps them."""
    return max((max(weight.shape) for weight in head.parameters() if weight.ndim == 2), default=2**17)


def _chunks(hidden_ND: Tensor, vocabulary: int) -> Iterator[slice]:
    """Equal parts of the N positions, each within the budget."""
    positions = hidden_ND.shape[0]
    most = max(1, CHUNK_BYTES[hidden_ND.device.type] // (4 * vocabulary))
    parts = -(-positions // most)
    size = -(-positions // max(1, parts))
    for start in range(0, positions, max(1, size)):
        yield slice(start, start + size)


def _suits(model: Any, context: RunContext) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return "it has no output head over a vocabulary" if head is None else None


def _apply(model: Any, context: RunContext) -> ModelEdit:
    size = CHUNK_BYTES[context.device] // 2**20
    line = f"linear_cross_entropy: used for the loss, {size} MiB of logits at a time"
    return ModelEdit(ops={"linear_cross_entropy": linear_cross_entropy}, report=[line])


SPEC = KernelSpec(
    id="linear_cross_entropy",
    op="linear_cross_entropy",
    summary="Output head and loss together, in chunks, gradients in the forward pass",
    models="every model with an output head",
    devices=frozenset({"cpu", "cuda"}),
    suits=_suits,
    apply=_apply,
    train_only=True,
)
