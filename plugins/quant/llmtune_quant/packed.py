"""A linear layer whose weight is a string of bytes, and the rule that makes them: what all formats here share.

Codes and scales of a layer lie behind each other in one parameter, whose elements have the type in which parameters
travel between ranks: sharding cuts it anywhere, and nothing on the way casts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtune import TensorPart


class Format(Protocol):
    """How the numbers of a weight (out, in) are stored. Plain settings, equal for all layers of a run."""

    def size(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight, its scales included."""
        ...

    def quantise(self, weight: Tensor) -> Tensor:
        """A weight to `size` bytes (uint8, flat)."""
        ...

    def dequantise(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        """Those bytes to the weight they stand for, in `dtype`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights before they are quantised and after they are dequantised: the run's compute type."""
        ...

    @property
    def label(self) -> str:
        """The format in a word or two, for the plan."""
        ...


class _Product(torch.autograd.Function):
    """`x W^T` that keeps the bytes of W for the backward pass, never W itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, layer: PackedLinear) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.layer = layer
        return x @ layer.unpacked(stored).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (stored,) = ctx.saved_tensors
        weight = ctx.layer.unpacked(stored)
        return gradient.to(weight.dtype) @ weight, None, None


class PackedLinear(nn.Linear):
    """`x W^T + b` with W (out, in) stored as a format says. A subclass of torch's layer so that PEFT adapts it."""

    def __init__(self, shape: tuple[int, int], bias: bool, form: Format, storage: torch.dtype) -> None:
        super().__init__(shape[1], shape[0], bias, device="meta")
        self.form = form
        rows = -(-form.size(shape) // storage.itemsize)
        self.weight = nn.Parameter(torch.empty(rows, 1, dtype=storage, device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `input`."""
        product = _Product.apply(input.to(self.form.dtype), self.weight.detach(), self)
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(input.dtype)

    def unpacked(self, stored: Tensor) -> Tensor:
        """W as (out, in), from the whole packed parameter."""
        return unpack(stored, (self.out_features, self.in_features), self.form)

    def dequantize(self) -> Tensor:
        """W as (out, in). Collective if it is sharded; empty if it is on meta."""
        weight: Any = self.weight.detach()
        if weight.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.form.dtype, device="meta")
        return self.unpacked(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)

    @property
    def W_q(self) -> Tensor:
        """Its presence makes PEFT call `dequantize` where it needs the plain weight (DoRA)."""
        return self.weight


def unpack(stored: Tensor, shape: tuple[int, int], form: Format) -> Tensor:
    """The weight (out, in) that a packed parameter stands for."""
    return form.dequantise(stored.contiguous().view(torch.uint8).reshape(-1)[: form.size(shape)], shape)


@dataclass(frozen=True)
class PackedRule:
    """Load rule: a linear layer's weight to its bytes."""

    layer: str
    shape: tuple[int, int]
    """(out, in), as the layer uses it."""
    form: Format
    storage: torch.dtype
    transposed: bool = False
    """Whether the source is (in, out), as in GPT-2's Conv1D."""

    @property
    def source(self) -> str:
        """The weight as the model had it."""
        return f"{self.layer}.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        """The packed weight, under the same name."""
        return (self.source,)

    def convert(self, source: Tensor) -> dict[str, Tensor]:
        """The bytes of the tensor in the run's compute type; the last element may end in zeros."""
        weight = (source.t() if self.transposed else source).to(self.form.dtype)
        made = self.form.quantise(weight.contiguous())
        room = made.new_zeros(-(-made.numel() // self.storage.itemsize) * self.storage.itemsize)
        room[: made.numel()] = made
        return {self.source: room.view(self.storage).unsqueeze(1)}

    def convert_part(self, part: TensorPart) -> None:
        """Formats look at a whole weight: every rank quantises it and keeps its rows of the bytes."""
        return None

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        """The dequantised weight in its original orientation."""
        whole = unpack(targets[self.source], self.shape, self.form)
        return whole.t().contiguous() if self.transposed else whole


def as_bytes(*parts: Tensor) -> Tensor:
    """Tensors behind each other, as flat bytes."""
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def scales_from(stored: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The last `count` numbers of some bytes, (count, 1). Copied: bytes may begin at any address."""
    return stored[stored.numel() - count * dtype.itemsize :].clone().view(dtype).unsqueeze(1)
