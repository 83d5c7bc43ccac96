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
from typing import TYPE_CHECKING

from torch import nn

from llmtune.contract.structure import text_layers, transformer_layers
from llmtune.model.modalities import parts_of
from llmtune.model.sizes import sizes_of
from llmtune.planning.memory_formulas import RECOMPUTED

if TYPE_CHECKING:
    from llmtune.planning.micro_batch import MicroBatch
    from llmtune.planning.model_plan import ModelPlan

HARDWARE_USE = 0.5
"""Share of the peak that a well-fed device reaches, recomputation counted: PaLM reports 57.8 % (with 46.2 % MFU), Llama
3 between 38 and 43 % MFU. An assumption, not a prediction."""


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


def count(plan: ModelPlan, batch: MicroBatch, causal: float | None = None) -> Flops:
    """FLOPs per token of the plan's data. `causal` replaces the tokens that one attends to on average.

    A tower's matrices meet patches of pictures or moments of sound, a projector's the tokens that stand for them.
    """
    layers, sizes = text_layers(plan.module), sizes_of(plan.module.config)
    blocks = tuple(f"{name}." for name, _ in transformer_layers(plan.module))
    trained = [place for place, (_, layer) in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    parts = parts_of(plan.module)
    order = {name: at for at, name in enumerate(parts)}
    seeing = [name for name, each in plan.module.named_parameters() if each.requires_grad]
    seeing = [order[name] for name in seeing if parts[name] != "language_model"]  # where gradients begin before it
    embedding = plan.module.get_input_embeddings()
    below = bool(seeing) or (embedding is not None and any(p.requires_grad for p in embedding.parameters()))
    first = 0 if below else min(trained, default=len(layers))
    forward = backward = inside = 0.0
    met = {"vision_tower": batch.pieces_share, "multi_modal_projector": batch.media_share, "language_model": 1.0}
    for name, place, numbers, trains, share in _matrices(plan, [name for name, _ in layers], batch):
        part = parts[name]
        passes_on = place >= first if part == "language_model" else order[name] > min(seeing, default=len(order))
        forward += 2 * numbers * share * met[part]
        backward += 2 * numbers * share * met[part] * (passes_on + trains)
        inside += 2 * numbers * met[part] if passes_on and name.startswith(blocks) else 0.0
    attended = batch.attended if causal is None else causal
    windows = (*sizes.windows, *[None] * len(layers))[: len(layers)]
    scores = [4 * sizes.queries * min(attended, window or attended) for window in windows]
    inside += sum(scores[first:])
    return Flops(
        forward=forward + sum(scores),
        backward=backward + 2 * sum(scores[first:]),
        recomputed=RECOMPUTED[plan.checkpointing] * inside,
    )


def _matrices(plan: ModelPlan, layers: list[str], batch: MicroBatch) -> Iterator[tuple[str, int, float, bool, float]]:
    """(name, place among the layers, numbers that a token meets, whether they train, share of the tokens that meet
    them) of all matrices but lookup tables. Quantised ones have their original size; what is in no layer comes last."""
    ledger, visited = plan.ledger, sizes_of(plan.module.config).visited
    originals = {now: ledger.shapes[name] for name, placed in ledger.rules.items() for now in placed.where.values()}
    head = plan.module.get_output_embeddings()
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    lookups = [module for module in plan.module.modules() if isinstance(module, nn.Embedding)]
    tables = {id(p) for module in lookups for p in module.parameters()} - heads
    supervised = batch.targets / max(batch.tokens, 1)
    for name, parameter in plan.module.named_parameters():
        size = originals.get(name, tuple(parameter.shape))
        if len(size) < 2 or id(parameter) in tables:
            continue
        place = next((i for i, prefix in enumerate(layers) if name.startswith(prefix + ".")), len(layers))
        met = visited if re.search(r"\bexperts\b", name) else 1.0
        share = supervised if id(parameter) in heads else 1.0
        yield name, place, math.prod(size) * met, parameter.requires_grad, share
