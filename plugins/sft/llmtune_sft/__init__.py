"""Learning to predict tokens: `stage_config: sft` on answers, `stage_config: pt` on plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtune import Batch, Plugin, RunContext, StageContext, StageLoss, hookimpl


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning has no keys of its own."""


@dataclass(frozen=True, kw_only=True)
class PtConfig:
    """Pretraining has no keys of its own."""


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Summed next-token cross-entropy of the tokens that train, times their weights, over the sum of the weights."""

    name: str
    metrics: ClassVar[tuple[str, ...]] = ()
    """The loss is all that is reported."""

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """A language model has a head over its vocabulary; a classifier has not."""
        head = model.get_output_embeddings()
        if head is None or getattr(head, "out_features", None) != model.config.get_text_config().vocab_size:
            found = f"{type(model).__name__} has no head over a vocabulary"
            yield f"{self.name} predicts tokens, and {found}; set model_class: llm"

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        return StageLoss(total=context.next_token_loss(model, batch))


@hookimpl
def stage_config() -> list[Plugin]:
    """The same loss under two names: which tokens train is a matter of the data."""
    return [
        Plugin(
            name="sft",
            config=SftConfig,
            build=lambda config: NextToken(name="sft"),
            summary="Supervised fine-tuning on the assistant's turns",
        ),
        Plugin(
            name="pt",
            config=PtConfig,
            build=lambda config: NextToken(name="pt"),
            summary="Pretraining, or going on with it, on plain text",
        ),
    ]
