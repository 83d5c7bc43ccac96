"""Checks on a loaded model, in a few tiny forwards: documents laid end to end must not see each other, and pieces of a
row must come to what the row comes to. Every model is asked, because some cannot."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from llmtune.contract.errors import PlanError
from llmtune.data.batches import collate, split_row, to_device

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune.contract.stages import Batch
    from llmtune.distributed.ranks import Ranks
    from llmtune.training.objective import Objective

FIRST, SECOND = 9, 7
"""Tokens of the two documents."""


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
        after_one = _rows(objective, [one, second], device)[FIRST:]
        after_other = _rows(objective, [other, second], device)[FIRST:]
        alone = _rows(objective, [second], device)
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


def check_split(objective: Objective, ranks: Ranks, device: torch.device) -> None:
    """Raise PlanError, on all ranks, if pieces of a row give other hidden states than the row. Collective.

    Recurrent layers, convolutions and attention that does not go through transformers' AttentionInterface mix tokens
    where no exchange takes place; the loss curve does not show it.
    """
    model: Any = objective.model
    size = ranks.dims.context
    tokens = torch.randint(
        0, model.config.get_text_config().vocab_size, (8 * size,), generator=torch.Generator().manual_seed(0)
    ).numpy()
    bounds = (0, 3 * size + 1, 5 * size, 8 * size)  # documents reach across the cuts between pieces
    documents = [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]
    whole = collate([(ids, ids >= 0) for ids in documents], flat=True, pad_id=0)
    training = objective.training
    objective.eval()
    with torch.no_grad():
        states = [hidden_states(objective, batch, device) for batch in (whole, split_row(whole, ranks))]
    objective.train(training)
    expected, found = states[0][8 * ranks.context_rank :][:8], states[1]
    error = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-6)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    rounding = 1e-3 if model.dtype == torch.float32 and objective.autocast is None else 5e-2
    if not error.item() <= rounding:
        raise PlanError(
            f"dist_config: cp_size is {size}, but {type(model).__name__} mixes tokens outside of attention (hidden "
            f"states change by {error.item():.0e} of their size when a row is split); set cp_size: 1"
        )


def _rows(objective: Objective, documents: list[np.ndarray], device: torch.device) -> Tensor:
    samples = [(ids.astype(np.int32), np.ones(len(ids), dtype=bool)) for ids in documents]
    return hidden_states(objective, collate(samples, flat=True, pad_id=0), device)


def hidden_states(objective: Objective, batch: Batch, device: torch.device) -> Tensor:
    """The backbone's last states (T, D) of a batch of one row, in float32."""
    model: Any = objective.model
    result = objective(lambda: model.base_model(**to_device(batch, device).model_inputs()))
    # A few models are their own base model, whose result is logits.
    states = result.last_hidden_state if hasattr(result, "last_hidden_state") else result.logits
    return states[0].float()
