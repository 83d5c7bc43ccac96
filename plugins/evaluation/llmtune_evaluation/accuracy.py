"""Whether each trained token is the one that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmtune import Batch, RunContext, StageContext

if TYPE_CHECKING:
    from torch import Tensor, nn


class Accuracy:
    """An evaluator of batches."""

    metrics = ("accuracy",)

    def check(self, context: RunContext, model: Any) -> Iterator[str]:
        """Models whose outputs are no tokens have no accuracy of tokens."""
        if model.get_output_embeddings() is None:
            yield (
                f"accuracy compares tokens, and {type(model).__name__} has no head over a vocabulary; remove it, the "
                "stage reports metrics of its own"
            )

    def measure_batch(
        self, model: nn.Module, batch: Batch, context: StageContext
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        right_N = context.likeliest(model, batch) == batch.targets
        return {"accuracy": (right_N.sum(), right_N.new_tensor(len(right_N), dtype=right_N.sum().dtype))}
