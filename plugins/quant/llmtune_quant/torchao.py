"""Weight-only formats of torchao: int8 and float8 with a scale for each output, int4 with one for each group.

torchao chooses scales and codes (`quantize_`); what it makes is kept as bytes, because its own tensors are a class that
neither checkpoints without pickles nor FSDP2's flat shards can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .bits import pack, packed_size, unpack
from .packed import as_bytes, scales_from

Kind = Literal["int8", "int4", "float8"]


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """Codes times scales, in the compute type."""

    kind: Kind
    group: int
    """Numbers along the inputs that share a scale; int4 only."""
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"torchao {self.kind}" + (f", groups of {self.group}" if self.kind == "int4" else "")

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0] * shape[1], self._bits) + self._scales(shape) * self.dtype.itemsize

    def quantise(self, weight: Tensor) -> Tensor:
        from torchao.quantization import quantize_

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, self._config())
        made: Any = layer.weight
        codes = made.qdata.contiguous()
        codes = pack((codes + 8).view(torch.uint8).reshape(-1), 4) if self.kind == "int4" else codes
        return as_bytes(codes, made.scale.to(self.dtype))

    def dequantise(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        scales = scales_from(stored, self._scales(shape), self.dtype).float()
        numbers = shape[0] * shape[1]
        if self.kind == "int4":
            codes = unpack(stored, numbers, 4).to(torch.int8) - 8
        else:
            codes = stored[:numbers].view(torch.int8 if self.kind == "int8" else torch.float8_e4m3fn)
        return (codes.view(len(scales), -1).float() * scales).to(self.dtype).view(shape)

    @property
    def _bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    def _scales(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] // self.group if self.kind == "int4" else shape[0]

    def _config(self) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        if self.kind == "int4":
            int4: Any = vars(torch)["int4"]  # which torch's type stubs lack
            return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(self.group))
        return Int8WeightOnlyConfig() if self.kind == "int8" else Float8WeightOnlyConfig()
