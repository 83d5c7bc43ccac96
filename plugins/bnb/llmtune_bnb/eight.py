"""8-bit weights for inference: one scale per output row. LLM.int8, https://arxiv.org/abs/2208.07339."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from torch import Tensor, nn

from llmtune import Part

OUTLIER = 6.0
"""Input columns with a magnitude from here on are multiplied in floating point; the paper's and transformers' value."""


class Linear8bit(bnb.nn.Linear8bitLt):
    """`x W^T + b` with W (out, in) in int8. Forward only."""

    def __init__(self, shape: tuple[int, int], bias: bool) -> None:
        super().__init__(shape[1], shape[0], bias, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
        self.register_buffer("SCB", torch.empty(shape[0], device="meta"))

    def statistics(self) -> list[Tensor]:
        """The buffers that belong to this weight alone."""
        return [self.SCB]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        flat = x.reshape(-1, x.shape[-1])
        rows, row_scales, outliers = int8_vectorwise_quant(flat.to(torch.float16), threshold=OUTLIER)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # The operation below bitsandbytes' autograd function, which logs a warning for every call that is not float16.
        product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            flat, rows, self.weight.detach(), row_scales, self.SCB, outliers, bias
        )
        return product.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequantize(self) -> Tensor:
        """W as (out, in), float32; empty if it is on meta."""
        if self.weight.is_meta:
            return torch.empty(self.weight.shape, device="meta")
        return int8_vectorwise_dequant(self.weight.detach(), self.SCB)

    @property
    def W_q(self) -> Tensor:
        """Its presence makes PEFT call `dequantize` where it needs the plain weight (DoRA)."""
        return self.weight

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        # bitsandbytes' version looks for the scales on the weight; here they are a buffer like any other.
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


@dataclass(frozen=True)
class Int8Rule:
    """Load rule: a linear layer's weight to int8 rows and their scales."""

    layer: str
    dtype: torch.dtype
    """The run's compute type: what the weight is rounded to before float16 and int8."""
    transposed: bool = False
    """Whether the source is (in, out), as in GPT-2's Conv1D."""

    @property
    def source(self) -> str:
        """The weight as the model had it."""
        return f"{self.layer}.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        """The int8 weight, under the same name, and the scales of its rows."""
        return (self.source, f"{self.layer}.SCB")

    def convert(self, source: Tensor) -> dict[str, Tensor]:
        """The same integers as bitsandbytes gives for the tensor in the run's compute type."""
        weight = (source.t() if self.transposed else source).contiguous()
        rows, scales, _ = int8_vectorwise_quant(weight.to(self.dtype).to(torch.float16))
        return {self.source: rows, f"{self.layer}.SCB": scales}

    def convert_part(self, part: Part) -> dict[str, Tensor] | None:
        """Inference runs on one rank: the whole tensor is always at hand."""
        return None

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        """The dequantised weight in its original orientation."""
        whole = int8_vectorwise_dequant(targets[self.source], targets[f"{self.layer}.SCB"]).to(self.dtype)
        return whole.t().contiguous() if self.transposed else whole
