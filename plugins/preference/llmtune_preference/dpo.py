"""The stage of preference pairs. N targets · S sequences, chosen and rejected in turn · P pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch, ModelSpec, StageContext, StageLoss

from . import MEANS, REFERENCE_FREE
from .answers import PAIR_METRICS, answers_of, pair_metrics, per_sequence, reference_keys, token_shares
from .losses import LOSSES, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from . import DpoConfig


class Pairs:
    """A loss of each pair of answers, summed; the denominator is pairs."""

    learns = ("preference",)
    counts = "samples"
    without_dropout = True
    metrics = (*PAIR_METRICS, "logps/chosen", "logps/rejected")

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        free = config.pref_loss in REFERENCE_FREE
        self.models: Mapping[str, ModelSpec] = {} if free else {"reference": ModelSpec(keys=reference_keys(config))}

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over the batch's pairs."""
        config, share_N = self.config, token_shares(batch)
        if config.ld_alpha is not None:
            share_N = share_N * shared_length(batch, config.ld_alpha)
        logps_S, count_S, scores_S = answers_of(model, batch, context, share_N, reference=bool(self.models))
        if config.pref_loss in MEANS:
            scores_S = scores_S / count_S
        loss_P = LOSSES[config.pref_loss](Scores(scores_S[0::2], scores_S[1::2]), config)
        if config.pref_ftx:
            loss_P = loss_P - config.pref_ftx * (logps_S / count_S)[0::2]
        said_S = logps_S.detach()
        logps = {"logps/chosen": said_S[0::2].sum(), "logps/rejected": said_S[1::2].sum()}
        return StageLoss(total=loss_P.sum(), metrics={**pair_metrics(config.pref_beta * scores_S), **logps})


def shared_length(batch: Batch, beyond: float) -> Tensor:
    """(N,) 1 for targets within the length that both answers of a pair have, `beyond` for those after it."""
    assert batch.target_sequence is not None
    sequence_N = batch.target_sequence
    length_S = per_sequence(torch.ones(len(sequence_N), device=sequence_N.device), batch)
    place_N = torch.arange(len(sequence_N), device=sequence_N.device) - (length_S.cumsum(0) - length_S)[sequence_N]
    shared_S = torch.minimum(length_S[0::2], length_S[1::2]).repeat_interleave(2)
    return torch.where(place_N < shared_S[sequence_N], 1.0, beyond)
