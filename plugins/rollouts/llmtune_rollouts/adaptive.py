"""Numbers that PPO carries from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .advantages import Moments


class KlCoefficient:
    """What the distance from the reference costs, raised where answers are further from it than `target`, lowered where
    they are nearer (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""

    def __init__(self, value: float, target: float | None, horizon: int) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, answers: float) -> None:
        """Adapt to the mean distance of so many answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * answers / self.horizon


class RunningScale(NamedTuple):
    """Mean and variance of all scores so far."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 1.0

    def joined(self, found: Moments) -> RunningScale:
        """With the scores of a step (Chan et al. 1979)."""
        count, apart = self.count + found.count, found.mean - self.mean
        if not found.count:
            return self
        squares = self.variance * self.count + found.variance * found.count
        squares += apart**2 * self.count * found.count / count
        return RunningScale(count, self.mean + apart * found.count / count, squares / count)

    @property
    def deviation(self) -> float:
        """As an estimate from a sample; 1 before there are two scores."""
        return (self.variance * self.count / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0
