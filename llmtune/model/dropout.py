"""Dropout off, for stages that compare what a model says with what it says elsewhere."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def switch_off(model: nn.Module) -> None:
    """Set every dropout of the model to 0: modules of dropout, and rates that other modules keep as numbers.

    transformers' attention layers hand `self.attention_dropout` to a function, others have a `dropout` or `..._pdrop`.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
            continue
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
