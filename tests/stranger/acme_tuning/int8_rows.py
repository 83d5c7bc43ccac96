"""Frozen weights as int8, each row with a float32 scale: its largest magnitude becomes 127."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtune import Change, EditError, Part, Situation, linear_layers, split_names

if TYPE_CHECKING:
    from acme_tuning import Int8RowsConfig


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) to int8 (out, in) and float32 (out,). A row of zeros keeps scale 0."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / 127
    return (wide / scale.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8), scale


def dequantise(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight (out, in) in float32, off by at most half a scale."""
    return packed.float() * scale.unsqueeze(1)


class Int8Linear(nn.Linear):
    """`x W^T + b` with W in int8. A linear layer to whoever looks for those, but without a `weight`.

    `packed` is a parameter, so that it is sharded with its layer; FSDP2 leaves the type of whole numbers alone. The
    scales are a buffer: a parameter of theirs would be rounded to the type in which parameters travel.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        shape = layer.weight.shape
        self.weight = None  # type: ignore[assignment]
        self.packed = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
        self.register_buffer("scale", torch.empty(shape[0], dtype=torch.float32, device="meta"))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out). The weight exists in full for the length of the product."""
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)

    def dequantize(self) -> Tensor:
        """W as (out, in), float32."""
        return dequantise(self.packed, self.scale)

    @property
    def W_q(self) -> Tensor:
        """Where PEFT looks for the stored weight of a layer that has no `weight`."""
        return self.packed


@dataclass(frozen=True)
class RowsRule:
    """Load rule: a weight to its bytes and scales. Rows do not depend on each other."""

    layer: str
    dtype: torch.dtype
    """What the restored weight is stored as."""

    @property
    def source(self) -> str:
        return f"{self.layer}.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        return (f"{self.layer}.packed", f"{self.layer}.scale")

    def convert(self, source: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.targets, quantise(source), strict=True))

    def convert_part(self, part: Part) -> dict[str, Tensor]:
        """Bytes of this rank's rows; scales of all rows, which every rank keeps."""
        packed, scale = self.targets
        columns = part.shape[1]
        start, stop = part.rows(packed)
        rows, own = quantise(part.elements(start * columns, stop * columns).reshape(-1, columns))
        return {packed: rows, scale: part.concatenate(own)}

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        packed, scale = (targets[name] for name in self.targets)
        return dequantise(packed, scale).to(self.dtype)


class Int8Rows:
    """The quant edit: every plain linear layer but output heads."""

    def __init__(self, config: Int8RowsConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module, situation: Situation) -> Change:
        """Swap the layers. Raises EditError if there is none."""
        skipped = split_names(self.config.skip_modules)
        layers = [
            (name, layer)
            for name, layer in linear_layers(model)
            if type(layer) is nn.Linear and name.rpartition(".")[2] not in skipped
        ]
        if not layers:
            raise EditError(f"quant_config: {type(model).__name__} has no linear layer left to store as int8")
        for name, layer in layers:
            model.set_submodule(name, Int8Linear(layer))
        weights = sum(layer.in_features * layer.out_features for _, layer in layers)
        return Change(
            rules=[RowsRule(name, situation.compute_dtype) for name, _ in layers],
            report=[f"{len(layers)} linear layers -> int8 rows: {weights / 1e6:.1f}M weights, a byte each"],
        )
