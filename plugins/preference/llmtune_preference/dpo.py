"""The stage of preference pairs. N targets · S sequences, chosen and rejected in turn · P pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch, ModelSpec, StageContext, StageLoss

from . import MEANS, REFERENCE_FREE
from .answers import (
    PAIR_METRICS,
    REFERENCE,
    answers_of,
    pair_metrics,
    reference_keys,
    reference_logps,
    token_shares,
)
from .losses import LOSSES, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from . import DpoConfig


MOVED = "moved"
"""(2,) how far the model has moved from its reference with the step's chosen and with its rejected answers."""


class Pairs:
    """A loss of each pair of answers, summed; the denominator is pairs."""

    learns = ("preference",)
    counts = "samples"
    without_dropout = True
    metrics = (*PAIR_METRICS, "logps/chosen", "logps/rejected")

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        free = config.pref_loss in REFERENCE_FREE
        reference = ModelSpec(keys=reference_keys(config), key="ref_model")
        self.models: Mapping[str, ModelSpec] = {} if free else {"reference": reference}
        self.precomputed = {"ld_alpha": config.ld_alpha} if config.precompute_reference else None

    def precompute(self, batch: Batch, context: StageContext) -> dict[str, Tensor]:
        """What the reference says to each answer."""
        return {REFERENCE: reference_logps(batch, context, self.shares(batch))}

    def shares(self, batch: Batch) -> Tensor:
        """(N,) what each target counts in its answer."""
        share_N, beyond = token_shares(batch), self.config.ld_alpha
        return share_N if beyond is None else share_N * shared_length(batch, beyond)

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over the batch's pairs."""
        config = self.config
        logps_S, count_S, scores_S = answers_of(model, batch, context, self.shares(batch), bool(self.models))
        if config.pref_loss in MEANS:
            scores_S = scores_S / count_S
        loss_P = LOSSES[config.pref_loss](Scores(scores_S[0::2], scores_S[1::2], batch.extra.get(MOVED)), config)
        if config.pref_ftx:
            loss_P = loss_P - config.pref_ftx * (logps_S / count_S)[0::2]
        said_S = logps_S.detach()
        logps = {"logps/chosen": said_S[0::2].sum(), "logps/rejected": said_S[1::2].sum()}
        return StageLoss(total=loss_P.sum(), metrics={**pair_metrics(config.pref_beta * scores_S), **logps})


class PairsOfStep(Pairs):
    """A loss of each pair that depends on the other pairs of its step, on all ranks, and is the same however the step
    is split."""

    def prepare(self, model: Any, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """Put how far the model has moved, as an estimate of the KL divergence, into each batch."""
        sums = torch.zeros(3, dtype=torch.float64, device=batches[0].input_ids.device)
        for batch in batches:
            ratio_S = answers_of(model, batch, context, self.shares(batch)).ratios.double()
            sums += torch.stack([ratio_S[0::2].sum(), ratio_S[1::2].sum(), ratio_S.new_tensor(len(ratio_S) / 2)])
        total = context.total(sums)
        moved = (total[:2] / total[2].clamp(min=1)).clamp(min=0).float()
        return [replace(batch, extra={**batch.extra, MOVED: moved}) for batch in batches]


def shared_length(batch: Batch, beyond: float) -> Tensor:
    """(N,) 1 for targets within the length that both answers of a pair have, `beyond` for those after it."""
    assert batch.target_sequence is not None
    sequence_N = batch.target_sequence
    length_S = batch.per_sequence(torch.ones(len(sequence_N), device=sequence_N.device))
    place_N = torch.arange(len(sequence_N), device=sequence_N.device) - (length_S.cumsum(0) - length_S)[sequence_N]
    shared_S = torch.minimum(length_S[0::2], length_S[1::2]).repeat_interleave(2)
    return torch.where(place_N < shared_S[sequence_N], 1.0, beyond)
