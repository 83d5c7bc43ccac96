"""The stage of single answers that are to be given or avoided (KTO). N targets · S answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch, ModelSpec, StageContext, StageLoss

from .answers import answers_of, reference_keys, token_shares

if TYPE_CHECKING:
    from . import KtoConfig


class Unpaired:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equation 7), summed over answers.

    An answer's reward is measured from how far the model has moved from the reference in general: the mean log-ratio of
    answers to other questions than their own, over the whole step and all ranks, which is an estimate of the KL
    divergence; it has no gradient, and counts as 0 where it is below.
    """

    learns = ("labelled",)
    counts = "samples"
    without_dropout = True
    metrics = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")

    def __init__(self, config: KtoConfig) -> None:
        self.config = config
        self.models: Mapping[str, ModelSpec] = {"reference": ModelSpec(keys=reference_keys(config), key="ref_model")}

    def prepare(self, model: Any, batches: Sequence[Batch], context: StageContext) -> list[Batch]:
        """Put the step's `kl` into each batch."""
        sums = torch.zeros(2, dtype=torch.float64, device=batches[0].input_ids.device)
        for batch in batches:
            assert batch.mismatched is not None, "labelled rows come with mismatched answers"
            crossed = answers_of(model, batch.mismatched, context, token_shares(batch.mismatched))
            sums[0] += crossed.ratios.double().sum()
            sums[1] += batch.mismatched.sequences
        moved, count = context.total(sums)
        kl = (moved / count.clamp(min=1)).clamp(min=0).float()
        return [replace(batch, extra={"kl": kl}) for batch in batches]

    def loss(self, model: Any, batch: Batch, context: StageContext) -> StageLoss:
        """The sum over the batch's answers."""
        config, kl = self.config, batch.extra["kl"]
        logps_S, count_S, ratio_S = answers_of(model, batch, context, token_shares(batch))
        desirable_S = torch.zeros(len(ratio_S), dtype=torch.bool) if batch.desirable is None else batch.desirable
        desirable_S = desirable_S.to(ratio_S.device)
        value_S = torch.sigmoid(config.pref_beta * torch.where(desirable_S, ratio_S - kl, kl - ratio_S))
        weight_S = torch.where(desirable_S, config.kto_chosen_weight, config.kto_rejected_weight)
        loss_S = weight_S * (1 - value_S)
        if config.pref_ftx:
            loss_S = loss_S - config.pref_ftx * torch.where(desirable_S, logps_S / count_S, 0.0)
        rewards_S, logps_S = config.pref_beta * ratio_S.detach(), logps_S.detach()
        metrics: dict[str, Any] = {"kl": kl * len(ratio_S)}
        for name, these_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
            metrics[f"rewards/{name}"] = ((rewards_S * these_S).sum(), these_S.float().sum())
            metrics[f"logps/{name}"] = ((logps_S * these_S).sum(), these_S.float().sum())
        return StageLoss(total=loss_S.sum(), metrics=metrics)
