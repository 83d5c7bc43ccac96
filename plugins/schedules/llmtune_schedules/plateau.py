"""The schedule that follows evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Gt, Le, Lt


@dataclass(frozen=True, kw_only=True)
class ReduceOnPlateauConfig:
    """Lower the rate when the evaluations' metric stops getting better, as torch's ReduceLROnPlateau does."""

    factor: Annotated[float, Gt(0), Lt(1)] = 0.1
    """What the rate is multiplied by."""
    patience: Annotated[int, Ge(0)] = 10
    """Evaluations without improvement that are let pass."""
    threshold: Annotated[float, Ge(0)] = 1e-4
    """By how much the metric must improve to count."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether `threshold` is a share of the best value or a difference."""
    cooldown: Annotated[int, Ge(0)] = 0
    """Evaluations after a reduction that do not count."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """Lowest learning rate as a share of `learning_rate`. torch gives it as a rate, `min_lr`."""


@dataclass
class Progress:
    """What a continued run has to know of the evaluations so far."""

    scale: float = 1.0
    best: float | None = None
    bad: int = 0
    cooling: int = 0


class ReduceOnPlateau:
    """A `Schedule` that `FollowsEvaluations`."""

    def __init__(self, config: ReduceOnPlateauConfig) -> None:
        self.config = config
        self.progress = Progress()

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """The product of all reductions so far."""
        return self.progress.scale

    def evaluated(self, value: float, greater_is_better: bool) -> None:
        """Count an evaluation; reduce where there were too many without improvement. NaN is none."""
        now, config = self.progress, self.config
        if self._is_better(value, greater_is_better):
            now.best, now.bad = value, 0
        else:
            now.bad += 1
        if now.cooling:
            now.cooling, now.bad = now.cooling - 1, 0
        if now.bad > config.patience:
            now.scale = max(now.scale * config.factor, config.min_lr_ratio)
            now.cooling, now.bad = config.cooldown, 0

    def _is_better(self, value: float, greater_is_better: bool) -> bool:
        best, config = self.progress.best, self.config
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        sign = 1.0 if greater_is_better else -1.0
        margin = config.threshold * (best if config.threshold_mode == "rel" else 1.0)
        bound = best + sign * margin
        return value > bound if greater_is_better else value < bound

    def state(self) -> dict[str, Any]:
        """The progress as plain numbers."""
        return asdict(self.progress)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.progress = Progress(**state)
