"""EETQ: int8 weights for inference on a GPU, one scale per output, multiplied by a kernel of NetEase.

The kernel comes from the hub through the package `kernels`, as in transformers (`kernels-community/quantization-eetq`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from llmtune import EditError, LoadError, LoadRule, ModelEdit, RunContext, TensorPart, linear_layers

TOLERANCE = 0.02
"""The largest error of a weight, of its size, that int8 explains with room to spare."""


@lru_cache
def kernel() -> Any:
    """EETQ's functions `quant_weights` and `w8_a16_gemm`; fetched from the hub on first use."""
    from transformers.integrations.hub_kernels import get_kernel

    return get_kernel("kernels-community/quantization-eetq", version=1)


class EetqLinear(nn.Linear):
    """`x W^T + b` with W (in, out) in the kernel's own int8 order. Forward only."""

    def __init__(self, shape: tuple[int, int], bias: bool) -> None:
        super().__init__(shape[1], shape[0], bias, device="meta")
        empty = torch.empty(shape[1], shape[0], dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("weight_scales", torch.empty(shape[0], dtype=torch.float16, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `input`."""
        flat = input.reshape(-1, input.shape[-1]).to(torch.float16)
        product = kernel().w8_a16_gemm(flat, self.weight, self.weight_scales).to(input.dtype)
        product = product if self.bias is None else product + self.bias.to(input.dtype)
        return product.reshape(*input.shape[:-1], self.out_features)


@dataclass(frozen=True)
class EetqRule:
    """Load rule: a linear layer's weight to EETQ's int8 order and the scales of its outputs."""

    layer: str
    dtype: torch.dtype

    @property
    def source(self) -> str:
        """The weight as the model had it."""
        return f"{self.layer}.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        """The int8 weight, under the same name, and its scales."""
        return (self.source, f"{self.layer}.weight_scales")

    def convert(self, source: Tensor) -> dict[str, Tensor]:
        """As transformers does it. Raises LoadError where the kernel does not give the weight back."""
        weight, scales = kernel().quant_weights(source.to(torch.float16).t().contiguous().cpu(), torch.int8, False)
        made = {self.source: weight.to(source.device), self.targets[1]: scales.to(source.device)}
        far = (self.restore(made) - source).float().norm() / source.float().norm()
        if not far < TOLERANCE:
            raise LoadError(
                f"eetq: the kernel gives {self.source} back with an error of {far:.1%}, int8 explains {TOLERANCE:.0%}; "
                "it does not fit this GPU: use quant_config: {name: bnb, quantization_bit: 8}"
            )
        return made

    def convert_part(self, part: TensorPart) -> None:
        """Inference runs on one rank: the whole tensor is always at hand."""
        return None

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        """The weight (out, in), which the kernel's product with the identity gives."""
        weight = targets[self.source]
        one = torch.eye(weight.shape[0], dtype=torch.float16, device=weight.device)
        return kernel().w8_a16_gemm(one, weight, targets[self.targets[1]]).t().contiguous().to(self.dtype)


class Eetq:
    """The quant edit: every plain linear layer but output heads."""

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """What it lacks here: inference, a GPU, the package that fetches its kernel."""
        if context.mode == "train":
            yield "eetq is for inference only; train with quant_config hqq or bnb and quantization_bit 4"
        elif context.device != "cuda":
            yield "eetq multiplies with a CUDA kernel, and there is no CUDA GPU here; use hqq with quantization_bit: 8"
        elif find_spec("kernels") is None:
            yield "eetq fetches its kernel with the package kernels, which is not installed: pip install kernels"

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Swap the layers. Raises EditError if there is none."""
        linear = [(name, layer) for name, layer in linear_layers(model) if type(layer) is nn.Linear]
        if not linear:
            raise EditError(
                f"quant_config: {type(model).__name__} has no linear layer besides its output head; remove quant_config"
            )
        rules: list[LoadRule] = []
        for name, layer in linear:
            new = EetqLinear((layer.out_features, layer.in_features), layer.bias is not None)
            new.bias = layer.bias
            new.train(layer.training)
            model.set_submodule(name, new)
            rules.append(EetqRule(name, context.compute_dtype))
        return ModelEdit(rules=rules, report=[f"{len(linear)} linear layers -> eetq int8"])
