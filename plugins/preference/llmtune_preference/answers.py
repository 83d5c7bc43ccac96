"""What stages over whole answers share. N targets · S sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmtune import Batch

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


def per_sequence(values_N: Tensor, batch: Batch) -> Tensor:
    """(S,) sums over the targets of each sequence."""
    assert batch.target_sequence is not None
    return values_N.new_zeros(batch.sequences).index_add(0, batch.target_sequence, values_N)


def token_shares(batch: Batch) -> Tensor:
    """(N,) the weight of each target in its answer."""
    share_N = torch.ones(len(batch.targets), device=batch.targets.device)
    for weight, spots in batch.weight_groups:
        share_N[spots] = weight
    return share_N
