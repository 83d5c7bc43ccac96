"""Floating-point operations of training, by one rule; docs/costs.md states it and its sources.

A product with a matrix of n numbers takes 2n operations a token in forward, 2n more for the gradient of its input
where anything below trains, and 2n more for its own gradient where it trains itself. Attention counts what a causal
mask leaves. Recomputation, norms, activations and the update do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.contract.structure import transformer_layers
from llmtune.cost.shape import Shape

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

HARDWARE_USE = 0.5
"""Share of the peak that a well-fed device reaches, recomputation counted: PaLM reports 57.8 % (with 46.2 % MFU), Llama
3 between 38 and 43 % MFU. An assumption, not a prediction."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix that tokens are multiplied with."""

    numbers: float
    """Those that a token meets: for experts, the share it visits."""
    trained: bool
    layer: int
    """-1 below the layers, their count above."""
    share: float = 1.0
    """Share of the tokens that meet it: the head sees those with a loss only."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations a trained token takes on average; multiply-adds count two."""

    forward: float
    backward: float
    recomputed: float
    """What activation checkpointing computes again; no part of the model's FLOPs."""

    @property
    def total(self) -> float:
        """The model's FLOPs of a token: forward and backward."""
        return self.forward + self.backward

    @property
    def expected_mfu(self) -> float:
        """Model FLOPs utilisation where the hardware runs at `HARDWARE_USE`."""
        return HARDWARE_USE * self.total / (self.total + self.recomputed)


def count(plan: Plan, shape: Shape, causal: float | None = None) -> Flops:
    """FLOPs per token of the plan's data. `causal` replaces the tokens that one attends to on average."""
    layers = transformer_layers(plan.model.module)
    found = list(matrices(plan, [name for name, _ in layers], shape))
    trained = [layer for layer, (_, module) in enumerate(layers) if any(p.requires_grad for p in module.parameters())]
    embedding = plan.model.module.get_input_embeddings()
    below = embedding is not None and any(p.requires_grad for p in embedding.parameters())
    first = 0 if below else min(trained, default=len(layers))
    attended = shape.attended if causal is None else causal
    config = plan.model.module.config
    scores = [4 * query_width(config) * window(config, layer, attended) for layer in range(len(layers))]
    forward = sum(2 * m.numbers * m.share for m in found) + sum(scores)
    backward = sum(2 * m.numbers * m.share * ((m.layer >= first) + m.trained) for m in found)
    backward += 2 * sum(scores[first:])
    inside = sum(2 * m.numbers for m in found if first <= m.layer < len(layers)) + sum(scores[first:])
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[plan.model.checkpointing]
    return Flops(forward=forward, backward=backward, recomputed=again * inside)


def matrices(plan: Plan, layers: list[str], shape: Shape) -> Iterator[Matrix]:
    """All matrices of the model but lookup tables, quantised ones by their original size."""
    model = plan.model.module
    originals = {
        now: plan.model.ledger.shapes[name]
        for name, placed in plan.model.ledger.rules.items()
        for now in placed.where.values()
    }
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    tables = {id(p) for m in model.modules() if type(m).__name__ == "Embedding" for p in m.parameters()} - heads
    share = shape.targets / max(shape.tokens, 1)
    for name, parameter in model.named_parameters():
        size = originals.get(name, tuple(parameter.shape))
        if len(size) < 2 or id(parameter) in tables:
            continue
        layer = next((i for i, prefix in enumerate(layers) if name.startswith(prefix + ".")), len(layers))
        numbers = math.prod(size) * visited(name, size, model.config.get_text_config())
        seen = share if id(parameter) in heads else 1.0
        yield Matrix(numbers=numbers, trained=parameter.requires_grad, layer=layer, share=seen)


def visited(name: str, size: tuple[int, ...], config: Any) -> float:
    """Share of a matrix that one token meets: less than 1 for experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen or not re.search(r"\bexperts\b", name):
        return 1.0
    return chosen / experts


def query_width(config: Any) -> int:
    """Width of all query heads together."""
    text = config.get_text_config()
    count = text.num_attention_heads
    return count * (getattr(text, "head_dim", None) or text.hidden_size // count)


def window(config: Any, layer: int, attended: float) -> float:
    """Tokens attended to on average, within the layer's window if it has one."""
    text = config.get_text_config()
    size = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    sliding = kinds[layer] == "sliding_attention" if kinds and layer < len(kinds) else False
    return min(attended, size) if size and sliding else attended
