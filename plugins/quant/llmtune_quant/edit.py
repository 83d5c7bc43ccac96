"""Replace linear layers by packed ones on the meta device, and say how their weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune import EditError, LoadRule, ModelEdit, RunContext, linear_layers

from .packed import Format, PackedLinear, PackedRule


class PackedEdit:
    """The quant edit: every linear layer but output heads, in one format."""

    def __init__(self, form_of: Callable[[torch.dtype], Format], group: int | None = None) -> None:
        """`form_of` gives the format for a compute type; `group` is how many numbers of a row share a scale, if the
        format has groups."""
        self.form_of, self.group = form_of, group

    def check(self, context: RunContext, model: nn.Module) -> Iterator[str]:
        """Rows have to end where groups end."""
        for name, layer in _quantisable(model):
            (_, width), _ = _out_in(layer)
            if self.group and width % self.group:
                fit = [str(size) for size in (128, 64, 32, 16, 8) if width % size == 0]
                yield (
                    f"group_size: found {self.group}, but {name} has {width} inputs, which groups of that size do not "
                    f"divide; {'use ' + ' or '.join(fit) if fit else 'use quant_config bnb'}"
                )
                return

    def apply(self, model: nn.Module, context: RunContext) -> ModelEdit:
        """Swap the layers. Raises EditError if the model has no linear layer to quantise."""
        linear = _quantisable(model)
        if not linear:
            raise EditError(
                f"quant_config: {type(model).__name__} has no linear layer besides its output head; remove quant_config"
            )
        form = self.form_of(context.compute_dtype)
        rules: list[LoadRule] = []
        before = stored = weights = 0
        for name, layer in linear:
            shape, transposed = _out_in(layer)
            new = PackedLinear(shape, layer.bias is not None, form, context.gather_dtype)
            new.bias = layer.bias
            new.train(layer.training)
            model.set_submodule(name, new)
            rules.append(PackedRule(name, shape, form, context.gather_dtype, transposed))
            before, weights = before + layer.weight.nbytes, weights + layer.weight.numel()
            stored += new.weight.nbytes
        line = (
            f"{len(linear)} linear layers -> {form.label}: {weights / 1e6:.1f}M weights, "
            f"{before / 1e6:.1f} -> {stored / 1e6:.1f} MB"
        )
        return ModelEdit(rules=rules, report=[line, *_stacks(model)])


def _stacks(model: nn.Module) -> list[str]:
    """A line on weights that are no linear layers, yet may be most of the model."""
    stacks = [p for _, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1]
    size = sum(p.nbytes for p in stacks)
    return [f"{len(stacks)} stacks of experts stay in full precision: {size / 1e6:.1f} MB"] if stacks else []


def _quantisable(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers whose whole meaning is `x W^T + b`: a subclass of `nn.Linear` may do more, and is left alone."""
    return [
        (name, layer) for name, layer in linear_layers(model) if type(layer) is nn.Linear or isinstance(layer, Conv1D)
    ]


def _out_in(layer: Any) -> tuple[tuple[int, int], bool]:
    """((outputs, inputs), whether the weight is stored the other way round, as in GPT-2's Conv1D)."""
    rows, columns = layer.weight.shape
    return ((columns, rows), True) if isinstance(layer, Conv1D) else ((rows, columns), False)
