"""What a stage says of a batch: its loss and metrics, as sums. Tensors in annotations only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StageLoss:
    """A sum over the micro-batch, not a mean: the loop divides by the weight of the whole step."""

    total: Tensor
    """Scalar with a graph: the summed loss of this micro-batch."""
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Detached sums, reported as `sum / weight`; or (sum, count) of what only some rows have, reported as their mean
    over the step, and left out where the step has none."""

    def sums(self) -> dict[str, Tensor]:
        """The loss and all metrics under their names, and the counts of those that have their own under `NAME#`."""
        found = {"loss": self.total}
        for name, value in self.metrics.items():
            found |= {name: value[0], name + COUNT: value[1]} if isinstance(value, tuple) else {name: value}
        return found


COUNT = "#"
"""What the name of a count ends with."""


def means(sums: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    """What is reported of summed `StageLoss.sums`; `weight` is the denominator of those without a count."""
    counts = {name.removesuffix(COUNT): value for name, value in sums.items() if name.endswith(COUNT)}
    plain = {name: value for name, value in sums.items() if not name.endswith(COUNT)}
    return {name: value / counts.get(name, weight) for name, value in plain.items() if counts.get(name, 1)}
