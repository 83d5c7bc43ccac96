"""The number type in which a model is given pictures and sound."""

from __future__ import annotations

from typing import Any

import torch


def cast_media(model: Any) -> None:
    """Let a transformers model read pictures and sound in the type of its weights, as transformers' own examples cast
    what a processor makes: that is float32 (Llama 4's bfloat16), and some towers take no other type than their own."""
    for module in {model, model.base_model}:
        module.register_forward_pre_hook(_cast, with_kwargs=True)


def _cast(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value.to(module.dtype) if _is_medium(value) else value for name, value in given.items()}


def _is_medium(value: Any) -> bool:
    """Whether an argument is pixels or features, and no numbers of seconds, which lie in one row."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
