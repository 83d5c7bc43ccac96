"""Next-token loss against targets that are `1 - beta` right and `beta` spread over the vocabulary.

Label smoothing: https://arxiv.org/abs/1512.00567.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llmtune import Batch, StageContext, StageLoss

if TYPE_CHECKING:
    from acme_tuning import SmoothedConfig


class Smoothed:
    """The stage. Reports the plain loss and the share of tokens predicted right beside what it minimises."""

    def __init__(self, config: SmoothedConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, context: StageContext) -> StageLoss:
        """Summed over the N positions that count; V is the size of the vocabulary."""
        head, transform = context.head(model), context.logit_transform(model)
        hidden_ND = context.hidden_states(model, batch).flatten(0, 1).index_select(0, batch.predict_at)
        plain = context.ops["linear_cross_entropy"](hidden_ND, head, batch.targets, transform)
        logits_NV = head(hidden_ND)
        if transform is not None:
            logits_NV = transform(logits_NV)
        even = -logits_NV.float().log_softmax(-1).mean(-1).sum()
        right = (logits_NV.detach().argmax(-1) == batch.targets).sum()
        return StageLoss(
            total=(1 - self.config.beta) * plain + self.config.beta * even,
            metrics={"plain_loss": plain.detach(), "accuracy": right.float()},
        )
