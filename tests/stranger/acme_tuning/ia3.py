"""Rescale the outputs of frozen layers by trained gains: a few thousand numbers for a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtune import Change, PlanError, Situation, linear_layers, split_names

if TYPE_CHECKING:
    from acme_tuning import Ia3Config


class Rescaled(nn.Module):
    """`base(x) * gain`, whatever kind of linear layer `base` is."""

    def __init__(self, base: nn.Module, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.gain = nn.Parameter(torch.empty(outputs, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of the base's output."""
        y = self.base(x)
        return y * self.gain.to(y.dtype)


class Ia3:
    """The peft edit."""

    kind = "adapter"

    def __init__(self, config: Ia3Config) -> None:
        self.config = config

    def apply(self, model: nn.Module, situation: Situation) -> Change:
        """Wrap the layers. Raises PlanError for a name that no linear layer has."""
        wanted = split_names(self.config.target_modules)
        layers: list[tuple[str, Any]] = [
            (name, layer) for name, layer in linear_layers(model) if isinstance(layer, nn.Linear)
        ]
        there = {name.rpartition(".")[2] for name, _ in layers}
        if absent := [name for name in wanted if name not in there]:
            raise PlanError(
                f"peft_config.target_modules: {type(model).__name__} has no linear layer {', '.join(absent)}; "
                f"it has {', '.join(sorted(there))}"
            )
        chosen = [(name, layer) for name, layer in layers if name.rpartition(".")[2] in wanted]
        for name, layer in chosen:
            model.set_submodule(name, Rescaled(layer, layer.out_features))
        gains = sum(layer.out_features for _, layer in chosen)
        return Change(
            fresh={f"{name}.gain": self._start for name, _ in chosen},
            trainable=_is_gain,
            report=[f"{gains:,} gains on {len(chosen)} layers: {', '.join(wanted)}"],
        )

    def save(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, situation: Situation) -> None:
        """`adapter.safetensors`: `<layer>.gain`, each (outputs,)."""
        base = {"base_model": situation.model_name or ""}
        save_file({name: gain.contiguous() for name, gain in tensors.items()}, folder / "adapter.safetensors", base)

    def merge(self, model: nn.Module) -> None:
        """Scale the rows of each weight, and the bias, by the gains."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, Rescaled):
                continue
            base: Any = module.base
            if type(base) is not nn.Linear:
                raise PlanError(f"peft_config: {name} is no plain linear layer; merge with quant_config: null")
            with torch.no_grad():
                base.weight.mul_(module.gain.to(base.weight.dtype).unsqueeze(1))
                if base.bias is not None:
                    base.bias.mul_(module.gain.to(base.bias.dtype))
            model.set_submodule(name, base)

    def _start(self, gain: Tensor) -> None:
        gain.fill_(self.config.start)


def _is_gain(name: str) -> bool:
    return name.endswith(".gain")
