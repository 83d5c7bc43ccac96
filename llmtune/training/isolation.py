"""Documents laid end to end must not see each other. Asked of every model, because some cannot keep them apart."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.contract.errors import PlanError
from llmtune.data.batches import collate, to_device

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.training.objective import Objective

FIRST, SECOND = 9, 7
"""Tokens of the two documents."""


def packing_obstacle(model: Any, attention: str) -> str | None:
    """Why `model` cannot keep packed documents apart, as far as its structure and the name of its attention tell before
    it has weights."""
    from importlib.util import find_spec

    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "takes no position ids, which tell documents apart"
    # Newer recurrent layers restart at document bounds where this package is installed; `check_isolation` asks them.
    if model._is_stateful and find_spec("fla") is None:
        return "has recurrent layers, which carry what they read into the next document"
    if attention.startswith("flash_attention"):  # is told the bounds
        return None
    if not model._supports_sdpa and not model._supports_attention_backend:
        return "has attention of its own, which knows no document bounds"
    if "mrope_section" in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
        return "has positions in three dimensions, in which the bounds of documents are lost"
    return None


def check_isolation(objective: Objective, device: torch.device, packing: bool) -> None:
    """Raise PlanError if a document's hidden states depend on the document before it. Collective; four tiny forwards.

    Recurrent layers, convolutions, position schemes counted over the whole row and attention without a mask for
    document bounds all leak, and the loss curve does not show it.
    """
    model: Any = objective.model
    vocabulary = model.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    one, other, second = (rng.integers(0, vocabulary, size) for size in (FIRST, FIRST, SECOND))
    training = objective.training
    objective.eval()
    with torch.no_grad():
        after_one = _states(objective, [one, second], device)[FIRST:]
        after_other = _states(objective, [other, second], device)[FIRST:]
        alone = _states(objective, [second], device)
    objective.train(training)
    size = alone.abs().max().clamp(min=1e-6)
    leak = ((after_one - after_other).abs().max() / size).item()
    shift = ((after_one - alone).abs().max() / size).item()
    # The first two run the same shapes, so rounding is alike; the third is laid out differently.
    rounding = 1e-3 if alone.dtype == torch.float32 and objective.autocast is None else 5e-2
    if leak > 1e-4 or shift > rounding:
        found = f"a document's hidden states change by {max(leak, shift):.0e} of their size with what stands before it"
        fix = "set packing: false, or neat_packing: false" if packing else "leave packed_attention out of kernel_config"
        raise PlanError(f"packing: {type(objective.model).__name__} cannot keep documents apart ({found}); {fix}")


def _states(objective: Objective, documents: list[np.ndarray], device: torch.device) -> Tensor:
    samples = [(ids.astype(np.int32), np.ones(len(ids), dtype=bool)) for ids in documents]
    batch = to_device(collate(samples, flat=True, pad_id=0), device)
    model: Any = objective.model
    result = objective(lambda: model.base_model(**batch.model_inputs()))
    # A few models are their own base model, whose result is logits.
    states = result.last_hidden_state if hasattr(result, "last_hidden_state") else result.logits
    return states[0].float()
