"""Adapters that lie beneath the one in use: merged into the weights as these are loaded, before they are quantised."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from llmtune import LoadError, PlanError

from .files import PREFIX, WEIGHTS, describe
from .starts import read_tensors, stored_transposed


@dataclass
class Merged:
    """Weight rule: the weight with an adapter of PEFT folded in, by PEFT itself; or a module that was trained whole."""

    source: str
    file: Path
    keys: list[str]
    config: LoraConfig = field(repr=False)
    transposed: bool = False
    """Whether the weight is (inputs, outputs), as in GPT-2's Conv1D."""
    targets: tuple[str, ...] = ()
    new: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The adapter's."""
        return (self.file,)

    def convert(self, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(the merged weight in float32, nothing else)."""
        held = dict(zip(self.keys, read_tensors(self.file, self.keys), strict=True))
        module, _, leaf = self.source.rpartition(".")
        if (trained := held.get(f"{PREFIX}{self.source}")) is not None:
            return self._fitting(weight, trained), {}
        assert leaf == "weight"
        wide = weight.to(torch.float32)
        wide = wide.T if self.transposed else wide
        root = _alone(module, wide, embedding=any("lora_embedding" in key for key in self.keys))
        config = copy.deepcopy(self.config)
        config.target_modules = [module]
        config.rank_pattern, config.alpha_pattern = (
            {key: value for key, value in (pattern or {}).items() if get_pattern_key([key], module) == key}
            for pattern in (config.rank_pattern, config.alpha_pattern)
        )
        config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
        config.exclude_modules = config.target_parameters = None
        config.fan_in_fan_out, config.init_lora_weights = False, True
        inject_adapter_in_model(config, root)
        layer: Any = root.get_submodule(module)
        names = {_key(module, name): tensor for name, tensor in layer.named_parameters() if "lora_" in name}
        if set(names) != set(held):
            raise LoadError(f"{self.file}: {describe(sorted(set(names) ^ set(held)))} do not go with its config")
        with torch.no_grad():
            for key, tensor in names.items():
                tensor.copy_(self._fitting(tensor, held[key]))
            layer.merge()
        merged = layer.get_base_layer().weight.detach()
        return merged.T if self.transposed else merged, {}

    def _fitting(self, there: Tensor, value: Tensor) -> Tensor:
        if there.shape != value.shape:
            raise LoadError(
                f"{self.file}: of another shape: {list(value.shape)}, {self.source} wants {list(there.shape)}. Check "
                "that the adapter was made for this model"
            )
        return value.to(there.device)


def _alone(name: str, weight: Tensor, embedding: bool) -> nn.Module:
    """A model of one layer, called `name`."""
    rows, columns = weight.shape
    layer = (
        nn.Embedding(rows, columns, device="meta") if embedding else nn.Linear(columns, rows, bias=False, device="meta")
    )
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    root = parent = nn.Module()
    *path, leaf = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, layer)
    return root


def _key(module: str, name: str) -> str:
    """PEFT's key of an adapter's tensor `name` in the layer `module`."""
    name = name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return f"{PREFIX}{module}.{name}"


def merged_rules(model: nn.Module, folder: Path, config: LoraConfig) -> list[Merged]:
    """A rule for each weight of the model (before its own adapters) that the adapter in `folder` changes.

    Raises PlanError for adapters of stacks of experts and of weights that two modules share, LoadError for keys that
    the model has no layer for.
    """
    if config.target_parameters:
        raise PlanError(
            f"peft_config.adapter_name_or_path: {folder} adapts stacks of experts, and only the last of several "
            "adapters may; export it first (llmtune export)"
        )
    if config.lora_bias:
        raise PlanError(
            f"peft_config.adapter_name_or_path: {folder} has biases of its own (lora_bias), and only the last of "
            "several adapters may; export it first (llmtune export)"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = sorted(file.keys())
    names = dict(model.named_parameters(remove_duplicate=False))
    shared = [id(parameter) for parameter in names.values()]
    by_source: dict[str, list[str]] = {}
    for key in keys:
        if key.endswith(".base_layer.weight"):
            continue
        plain = key.removeprefix(PREFIX)
        layer, found, _ = plain.partition(".lora_")
        by_source.setdefault(f"{layer}.weight" if found else plain, []).append(key)
    if odd := [source for source in by_source if source not in names]:
        raise LoadError(
            f"{folder / WEIGHTS} does not fit {type(model).__name__}. not part of this model: {describe(odd)}. "
            "Check that it was made for this model"
        )
    if tied := [source for source in by_source if shared.count(id(names[source])) > 1]:
        raise PlanError(
            f"peft_config.adapter_name_or_path: {folder} changes {tied[0]}, whose weight another module shares, and "
            "only the last of several adapters may; export it first (llmtune export)"
        )
    return [
        Merged(
            source,
            folder / WEIGHTS,
            keys,
            config,
            transposed=stored_transposed(model, model.get_submodule(source.rpartition(".")[0])),
        )
        for source, keys in by_source.items()
    ]
