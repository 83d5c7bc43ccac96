"""The largest micro-batch a rank can meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llmtune.planning import Plan
    from llmtune.stages import Batch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that memory depends on."""

    rows: int
    """Rows of the micro-batch; 1 where documents are laid end to end."""
    length: int
    """Tokens of a row on this rank."""
    targets: int
    """Positions that a loss is computed for."""
    micro_steps: int
    """Micro-batches of an optimiser step."""
    masked: bool = False
    """Whether rows differ in length, so that there is a mask."""
    flat: bool = False
    """Whether documents are laid end to end."""
    mean_tokens: float = 0.0
    """Tokens of a micro-batch on average, without padding."""
    attended: float = 0.0
    """Earlier tokens, itself included, that a token attends to on average."""

    @property
    def tokens(self) -> int:
        """Token positions, padding included."""
        return self.rows * self.length


def largest(plan: Plan) -> Shape:
    """The micro-batch with the longest rows together: what memory must suffice for, whatever the order."""
    import numpy as np

    assert plan.data is not None and plan.feed is not None
    samples, train = plan.data.train, plan.recipe.train
    lengths, counted = samples.lengths, samples.supervised
    units = plan.feed.units
    bounds = np.cumsum([0, *(len(unit) for unit in units)])
    flat_indices = np.fromiter((i for unit in units for i in unit), dtype=np.int64, count=int(bounds[-1]))
    per_unit = np.add.reduceat(lengths[flat_indices], bounds[:-1])
    targets = np.add.reduceat(counted[flat_indices], bounds[:-1])
    size = min(train.per_device_train_batch_size, len(per_unit))
    longest = np.sort(per_unit)[-size:]
    flat = plan.feed.flat
    share = plan.ranks.layout.context
    total = float(lengths.sum())
    return Shape(
        rows=1 if flat else size,
        length=-(-int(longest.sum() if flat else longest[-1]) // share),
        targets=-(-int(np.sort(targets)[-size:].sum()) // share),
        micro_steps=train.gradient_accumulation_steps,
        masked=not flat and size > 1 and bool(lengths.min() < lengths.max()),
        flat=flat,
        mean_tokens=total / len(per_unit) * size,
        attended=float((lengths.astype(float) * (lengths + 1)).sum()) / 2 / max(total, 1.0),
    )


def fake_batch(shape: Shape, make: Any) -> Batch:
    """A micro-batch of this shape, its tensors made by `make(*size, dtype)`. A flat one is a single document."""
    import torch

    from llmtune.stages import Batch

    def whole(*size: int) -> torch.Tensor:
        return make(*size, dtype=torch.int64)

    return Batch(
        input_ids=whole(shape.rows, shape.length),
        labels=whole(shape.rows, shape.length),
        weight=float(shape.targets),
        predict_at=whole(shape.targets),
        targets=whole(shape.targets),
        position_ids=whole(shape.rows, shape.length) if shape.flat else None,
        attention_mask=whole(shape.rows, shape.length) if shape.masked else None,
    )
