"""The stage of preference pairs. N targets · S sequences, chosen and rejected in turn · P pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch, ModelSpec, StageContext, StageLoss

from . import REFERENCE_FREE
from .answers import per_sequence, reference_keys, token_shares
from .losses import LOSSES, MEANS, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from . import DpoConfig


class Pairs:
    """A loss of each pair of answers, summed; the denominator is pairs."""

    learns = ("preference",)
    counts = "samples"
    without_dropout = True
    metrics = (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        free = config.pref_loss in REFERENCE_FREE
        self.models: Mapping[str, ModelSpec] = {} if free else {"reference": ModelSpec(keys=reference_keys(config))}

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over the batch's pairs. The reference answers first, before the model's activations are there."""
        config, mean = self.config, self.config.pref_loss in MEANS
        share_N = token_shares(batch)
        if config.ld_alpha is not None:
            share_N = share_N * shared_length(batch, config.ld_alpha)
        reference_N = None
        if self.models:
            reference_N = context.with_model("reference", lambda other, its: its.token_logps(other, batch))
        logps_N = context.token_logps(model, batch)
        logps_S, count_S = per_sequence(logps_N * share_N, batch), per_sequence(share_N, batch).clamp(min=1e-6)
        scores_S = logps_S if reference_N is None else logps_S - per_sequence(reference_N * share_N, batch)
        if mean:
            scores_S = scores_S / count_S
        loss_P = LOSSES[config.pref_loss](Scores(scores_S[0::2], scores_S[1::2]), config)
        if config.pref_ftx:
            loss_P = loss_P - config.pref_ftx * (logps_S / count_S)[0::2]
        return StageLoss(total=loss_P.sum(), metrics=self._metrics(scores_S.detach(), logps_S.detach()))

    def _metrics(self, scores_S: Tensor, logps_S: Tensor) -> dict[str, Tensor]:
        rewards_S = self.config.pref_beta * scores_S
        chosen_P, rejected_P = rewards_S[0::2], rewards_S[1::2]
        return {
            "rewards/chosen": chosen_P.sum(),
            "rewards/rejected": rejected_P.sum(),
            "rewards/margins": (chosen_P - rejected_P).sum(),
            "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
            "logps/chosen": logps_S[0::2].sum(),
            "logps/rejected": logps_S[1::2].sum(),
        }


def shared_length(batch: Batch, beyond: float) -> Tensor:
    """(N,) 1 for targets within the length that both answers of a pair have, `beyond` for those after it."""
    assert batch.target_sequence is not None
    sequence_N = batch.target_sequence
    length_S = per_sequence(torch.ones(len(sequence_N), device=sequence_N.device), batch)
    place_N = torch.arange(len(sequence_N), device=sequence_N.device) - (length_S.cumsum(0) - length_S)[sequence_N]
    shared_S = torch.minimum(length_S[0::2], length_S[1::2]).repeat_interleave(2)
    return torch.where(place_N < shared_S[sequence_N], 1.0, beyond)
