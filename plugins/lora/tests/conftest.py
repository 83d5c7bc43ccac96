"""What the core does to a model between a peft plugin's edit and its first forward pass, in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune import ModelEdit, RunContext

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4]])


def context(**changes: Any) -> RunContext:
    values = {
        "mode": "train", "device": "cpu", "ranks": 1, "compute_dtype": torch.float32,
        "trainable_dtype": torch.float32, "gather_dtype": torch.float32, "model_name": "some/base", "revision": "main",
    }  # fmt: skip
    return RunContext(**(values | changes))


def config(family: str = "llama", **changes: Any) -> Any:
    values = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return AutoConfig.for_model(family, **(values | changes))


def original(settings: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def skeleton(source: nn.Module) -> nn.Module:
    with torch.device("meta"):
        model = type(source)._from_config(source.config)
    model.tie_weights()
    return model


def fill(model: nn.Module, source: nn.Module, change: ModelEdit) -> None:
    """Base weights by name, then what the change reports, then its last steps."""
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    ties = {alias: name for name, alias in zip_ties(model)}
    model.to_empty(device="cpu")
    for alias, name in ties.items():
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dict(model.named_parameters())[name])
    weights = source.state_dict() | dict(source.named_buffers())
    made: dict[str, torch.Tensor] = {}
    for rule in change.weight_rules:
        weights[rule.source], new = rule.convert(weights[rule.source])
        made |= new
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    new = {*change.fresh, *change.copies, *change.files, *made}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in new:
                tensor.copy_(weights[name.replace(".base_layer", "").replace(".original_module", "")])
        for name, value in made.items():
            tensors[name].copy_(value)
        for name, start in change.fresh.items():
            start(tensors[name])
        for name, (path, key) in change.files.items():
            tensors[name].copy_(load_file(path)[key])
        for name, of in change.copies.items():
            tensors[name].copy_(tensors[of])
    for step in change.after_load:
        step(model)
    if change.trainable is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(change.trainable(name))
    model.eval()


def zip_ties(model: nn.Module) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    ties = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties.append((first[id(parameter)], name))
        first.setdefault(id(parameter), name)
    return ties


def adapted(source: nn.Module, edit: Any, where: RunContext | None = None) -> tuple[nn.Module, ModelEdit]:
    model = skeleton(source)
    change = edit.apply(model, where or context())
    fill(model, source, change)
    return model, change


def disturb(model: nn.Module, seed: int = 7) -> dict[str, torch.Tensor]:
    """Give every trained tensor a value far from its start, as training would; returns them."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.fixture
def tools() -> dict[str, Callable[..., Any]]:
    return {
        "context": context, "config": config, "original": original, "skeleton": skeleton, "adapted": adapted,
        "disturb": disturb, "ids": IDS,
    }  # fmt: skip
