"""What stages over whole answers share. N targets · S sequences · P pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmtune import Batch, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from . import ReferenceKeys


def reference_keys(config: ReferenceKeys) -> dict[str, Any]:
    """The keys of a recipe in which the reference differs from the trained model; none where it is its start."""
    keys: dict[str, Any] = {}
    if config.ref_model is not None:
        keys |= {"model": config.ref_model, "revision": None, "quant_config": None, "peft_config": None}
    if config.ref_model_adapters is not None:
        keys["peft_config"] = {"name": "lora", "adapter_name_or_path": config.ref_model_adapters}
    if config.ref_model_quantization_bit is not None:
        keys["quant_config"] = {"name": "auto", "quantization_bit": config.ref_model_quantization_bit}
    return keys


def token_shares(batch: Batch) -> Tensor:
    """(N,) the weight of each target in its answer."""
    share_N = torch.ones(len(batch.targets), device=batch.targets.device)
    for weight, spots in batch.weight_groups:
        share_N[spots] = weight
    return share_N


class Answers(NamedTuple):
    """What a model says to the answers of a batch: (S,) float32 each."""

    logps: Tensor
    """Summed log-probability, times the tokens' shares."""
    shares: Tensor
    """Summed shares of the tokens, above 0."""
    ratios: Tensor
    """`logps` less those of the reference; `logps` themselves where none is asked."""


REFERENCE = "reference_logps"
"""The precomputed numbers of answers: what the reference says to them."""


def reference_logps(batch: Batch, context: StageContext, share_N: Tensor) -> Tensor:
    """(S,) float32, an answer's summed log-probability under the reference, times the tokens' shares."""
    said_N = context.with_model("reference", lambda it, its: its.token_logps(it, batch))
    return batch.per_sequence(said_N * share_N)


def answers_of(model: Any, batch: Batch, context: StageContext, share_N: Tensor, reference: bool = True) -> Answers:
    """Ask the model, and its reference unless it was asked before training. It is asked first, while the model's
    activations are not there yet."""
    said_S = torch.zeros(())
    if reference:
        said_S = batch.extra[REFERENCE] if REFERENCE in batch.extra else reference_logps(batch, context, share_N)
    logps_S = batch.per_sequence(context.token_logps(model, batch) * share_N)
    return Answers(logps_S, batch.per_sequence(share_N).clamp(min=1e-6), logps_S - said_S)


PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def pair_metrics(rewards_S: Tensor) -> dict[str, Tensor]:
    """Sums over pairs, chosen and rejected in turn, of the rewards of their answers."""
    chosen_P, rejected_P = rewards_S.detach()[0::2], rewards_S.detach()[1::2]
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).float().sum(),
    }
