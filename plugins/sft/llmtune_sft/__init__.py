"""Supervised fine-tuning: `stage_config: sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Batch, Plugin, StageContext, StageLoss, hookimpl


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning has no keys of its own."""


class Sft:
    """Summed next-token cross-entropy of the supervised tokens; the weight is their number."""

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
