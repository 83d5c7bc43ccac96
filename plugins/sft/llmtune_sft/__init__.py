"""Supervised fine-tuning: `stage_config: sft`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtune import Batch, Plugin, Situation, StageContext, StageLoss, hookimpl


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning has no keys of its own."""


class Sft:
    """Summed next-token cross-entropy of the supervised tokens; the weight is their number."""

    def check(self, situation: Situation, model: Any) -> Iterator[str]:
        """A language model has a head over its vocabulary; a classifier has not."""
        head = model.get_output_embeddings()
        if head is None or getattr(head, "out_features", None) != model.config.get_text_config().vocab_size:
            yield f"sft predicts tokens, and {type(model).__name__} has no head over a vocabulary; set model_class: llm"

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        return StageLoss(total=context.next_token_loss(model, batch))


@hookimpl
def stage_config() -> list[Plugin]:
    """Supervised fine-tuning."""
    return [
        Plugin(
            name="sft",
            config=SftConfig,
            build=lambda config: Sft(),
            summary="Supervised fine-tuning on the assistant's turns",
        )
    ]
