"""Replace linear layers by quantised ones on the meta device, and say how their weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune import EditError, LoadRule, ModelEdit, RunContext, linear_layers

from .eight import Int8Rule, Linear8bit
from .four import FourBitRule, FourBits, Linear4bit

if TYPE_CHECKING:
    from . import BnbConfig


class Bnb:
    """The quant edit: every linear layer but output heads."""

    def __init__(self, config: BnbConfig) -> None:
        self.config = config

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """8-bit bases cannot be trained on."""
        if self.config.quantization_bit == 8 and context.mode == "train":
            yield (
                "quantization_bit is 8, which is for inference only: its products round the activations to 8 bits, so "
                "that gradients are not those of the model. Train with quantization_bit: 4, or without quant_config"
            )

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Swap the layers. Raises EditError if the model has no linear layer to quantise."""
        linear = list(quantisable(linear_layers(model)))
        if not linear:
            raise EditError(
                f"quant_config: {type(model).__name__} has no linear layer besides its output head; remove quant_config"
            )
        make = self._four if self.config.quantization_bit == 4 else self._eight
        before = sum(layer.weight.numel() * layer.weight.element_size() for _, layer in linear)
        weights = sum(layer.weight.numel() for _, layer in linear)
        rules: list[LoadRule] = []
        stored = 0
        for name, layer in linear:
            new, rule = make(name, layer, context)
            new.bias = layer.bias
            new.train(layer.training)
            model.set_submodule(name, new)
            rules.append(rule)
            stored += sum(t.numel() * t.element_size() for t in (new.weight, *new.statistics()))
        # PEFT and other libraries look here to learn what they wrap.
        setattr(model, f"is_loaded_in_{self.config.quantization_bit}bit", True)
        line = (
            f"{len(linear)} linear layers -> {self._kind()}: {weights / 1e6:.1f}M weights, "
            f"{before / 1e6:.1f} -> {stored / 1e6:.1f} MB"
        )
        return ModelEdit(rules=rules, report=[line, *_stacks(model)])

    def _kind(self) -> str:
        if self.config.quantization_bit == 8:
            return "int8"
        return self.config.quantization_type + (" (double quantisation)" if self.config.double_quantization else "")

    def _four(self, name: str, layer: Any, context: RunContext) -> tuple[Linear4bit, LoadRule]:
        bits = FourBits(
            kind=self.config.quantization_type,
            double=self.config.double_quantization,
            dtype=context.compute_dtype,
            storage=context.gather_dtype,
        )
        product = self.config.compute_dtype
        compute = context.compute_dtype if product == "auto" else getattr(torch, product)
        shape, transposed = out_in(layer)
        return Linear4bit(shape, layer.bias is not None, bits, compute), FourBitRule(name, shape, bits, transposed)

    def _eight(self, name: str, layer: Any, context: RunContext) -> tuple[Linear8bit, LoadRule]:
        shape, transposed = out_in(layer)
        return Linear8bit(shape, layer.bias is not None), Int8Rule(name, context.compute_dtype, transposed)


def _stacks(model: nn.Module) -> list[str]:
    """A line on weights that are no linear layers, yet may be most of the model."""
    stacks = [p for _, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1]
    size = sum(p.numel() * p.element_size() for p in stacks)
    return [f"{len(stacks)} stacks of experts stay in full precision: {size / 1e6:.1f} MB"] if stacks else []


def quantisable(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """Layers whose whole meaning is `x W^T + b`: a subclass of `nn.Linear` may do more, and is left alone."""
    for name, layer in layers:
        if type(layer) is nn.Linear or isinstance(layer, Conv1D):
            yield name, layer


def out_in(layer: Any) -> tuple[tuple[int, int], bool]:
    """((outputs, inputs), whether the weight is stored the other way round, as in GPT-2's Conv1D)."""
    rows, columns = layer.weight.shape
    return ((columns, rows), True) if isinstance(layer, Conv1D) else ((rows, columns), False)
