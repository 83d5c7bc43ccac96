"""The sizes of a transformers config that costs depend on, under one name each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Numbers of one text model."""

    width: int
    """D: numbers of a hidden state."""
    inner: int
    """F: numbers between the projections of the MLP, for all experts that a token visits together."""
    heads: int
    """Query heads of a layer."""
    queries: int
    """Numbers of all query heads together."""
    keys: int
    """Numbers of all key heads together."""
    vocabulary: int
    positions: int
    """Tokens that the model's positions were made for, `rope_scaling` counted; 0 where the config does not say."""
    visited: float
    """The share of the experts that a token visits; 1 where there are none."""
    windows: tuple[int | None, ...]
    """Tokens that each layer attends back to; None, or no entry, where a layer attends to all."""


def sizes_of(config: Any) -> ModelSizes:
    """The sizes of a model's config, whichever of transformers' names it uses for them."""
    text = config.get_text_config()

    def first(*names: str, default: Any = 0) -> Any:
        # Families name one thing differently, and leave out what they do not have.
        return next((found for name in names if (found := _value(text, name))), default)

    width, heads = first("hidden_size", default=1), first("num_attention_heads", default=1)
    head = first("head_dim", default=width // heads)
    experts, chosen = first("num_local_experts", "num_experts"), first("num_experts_per_tok", default=1)
    one = first("moe_intermediate_size") if experts else 0
    kinds, window = first("layer_types", default=()), first("sliding_window")
    return ModelSizes(
        width=width,
        inner=(one or first("intermediate_size", "n_inner", default=4 * width)) * chosen,
        heads=heads,
        queries=heads * head,
        keys=first("num_key_value_heads", default=heads) * head,
        vocabulary=first("vocab_size"),
        positions=first("max_position_embeddings", "n_positions"),
        visited=chosen / experts if experts else 1.0,
        windows=tuple(window or None if kind == "sliding_attention" else None for kind in kinds),
    )


def _value(text: Any, name: str) -> Any:
    """What a config says; of layers, or kinds of experts (Ernie VL), that have values of their own, the largest."""
    try:
        found = getattr(text, name, None)
        return max(found) if isinstance(found, list) and found and isinstance(found[0], int) else found
    except RuntimeError:  # transformers' word for a value that layers have of their own, from 5.24 on: the largest
        own = [getattr(layer, name, None) for layer in text.per_layer_config]
        return max((value for value in own if value is not None), default=None)
