"""What the core does to a model between a quant plugin's edit and its first forward pass, in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune import RunContext

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4]])


def context(**changes: Any) -> RunContext:
    values = {
        "mode": "train", "device": "cpu", "ranks": 1, "compute_dtype": torch.float32,
        "trainable_dtype": torch.float32, "gather_dtype": torch.float32,
    }  # fmt: skip
    return RunContext(**(values | changes))


def config(family: str = "llama", **changes: Any) -> Any:
    values = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return AutoConfig.for_model(family, **(values | changes))


def original(settings: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=dtype)


def quantised(source: nn.Module, edit: Any, where: RunContext) -> tuple[nn.Module, Any]:
    """The source's structure on meta, edited, then filled from the source's weights by the change's rules."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=where.compute_dtype)
    change = edit.apply(model, where)
    model.to_empty(device="cpu")
    weights = source.state_dict()
    ruled = {rule.source: rule for rule in change.rules}
    state = {}
    for name, tensor in weights.items():
        state |= ruled[name].convert(tensor) if name in ruled else {name: tensor}
    for name, buffer in source.named_buffers():  # rotary frequencies; the core keeps them real from the start
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(state, strict=True)
    restore_codes(model)
    return model, change


def restore_codes(model: nn.Module) -> None:
    """`to_empty` wipes what the core only moves: buffers that are real from the start."""
    from llmtune_bnb.four import Linear4bit, codes

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.code, layer.nested_code = codes(layer.bits.kind)


@pytest.fixture
def tools() -> dict[str, Callable[..., Any]]:
    return {"context": context, "config": config, "original": original, "quantised": quantised, "ids": IDS}
