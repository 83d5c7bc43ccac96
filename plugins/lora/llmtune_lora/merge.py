"""Fold adapters into their base, leaving the plain modules of the original model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def fold(model: Any, adapters: Sequence[str]) -> None:
    """Merge `adapters` one after another, each onto the result of those before, and remove PEFT's wrappers."""
    _separate_tied(model)
    for adapter in adapters:
        for module in list(model.modules()):
            if isinstance(module, LoraLayer) and adapter in module.r:
                module.merge(adapter_names=[adapter])
                # The next adapter takes the merged weight as its base: DoRA measures its norm.
                module.merged_adapters.clear()
            elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
                module.original_module = module.modules_to_save[adapter]
    wrapped = ""
    for name, module in list(model.named_modules()):
        if wrapped and name.startswith(wrapped):
            continue  # several weights of one module have wrappers inside each other, and the outermost is gone
        if isinstance(module, LoraLayer):
            wrapped = f"{name}."
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config
    _declare_untied(model)


def _separate_tied(model: nn.Module) -> None:
    """Give an adapted layer a weight of its own where it shares one: what is added to it is not meant for the other."""
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if hasattr(base, "weight") and holders.get(id(base.weight), 0) > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)


def _declare_untied(model: Any) -> None:
    """Tell the config if embeddings and head are no longer the same tensor; else loading would tie them again."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if not ties:
        return
    held = dict(model.named_parameters(remove_duplicate=False))
    kept = {name: source for name, source in ties.items() if held.get(name) is held.get(source)}
    model.all_tied_weights_keys = kept
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def set_magnitudes(model: nn.Module, adapter: str) -> None:
    """DoRA's starting point: each magnitude is the norm of its weight, so that the adapted model equals the base.

    B is zero at the start, so the norm of `W + scaling * B A` is that of W; PEFT's own method takes it.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            dora: Any = module.lora_magnitude_vector[adapter]
            with torch.no_grad():
                weight = whole_weight(module.get_base_layer())
                norm = dora.get_weight_norm(weight, weight.new_zeros(()), module.scaling[adapter])
                _put(dora.weight, norm)


def whole_weight(layer: Any) -> torch.Tensor:
    """A layer's weight in full, dequantised, gathered. Collective if the model is sharded."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    weight = layer.weight.detach()
    if hasattr(weight, "full_tensor"):
        return weight.to(weight.device_mesh.device_type).full_tensor()
    return weight


def _put(parameter: Any, value: torch.Tensor) -> None:
    """Write the whole `value` into a parameter of which this rank may hold a part only."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the value already: src_data_rank=None cuts without sending.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
