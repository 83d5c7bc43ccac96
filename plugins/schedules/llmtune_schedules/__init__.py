"""Learning rate after warm-up: `lr_scheduler_config: linear | cosine | constant | polynomial`.

Each schedule is a pure function of the step, so a continued run needs no state of it. Values equal those of
transformers' `get_scheduler` at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from llmtune import Ge, Gt, Le, Plugin, hookimpl

Ratio = Annotated[float, Ge(0), Le(1)]


def progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the steps after warm-up that are done: 0 at `warmup_steps`, 1 at `total_steps` and beyond."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Straight down to 0 at the last step. It has no keys."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up, 0 at `total_steps`."""
        return 1.0 - progress(step, total_steps, warmup_steps)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Along a cosine (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts)."""

    num_cycles: Annotated[float, Gt(0)] = 0.5
    """Waves over the run: 0.5 goes down once, 1 goes down and comes back up."""
    min_lr_ratio: Ratio = 0.0
    """Lowest learning rate as a share of `learning_rate`; transformers calls it `min_lr_rate`."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up, `min_lr_ratio` wherever the cosine is lowest."""
        angle = 2.0 * math.pi * self.num_cycles * progress(step, total_steps, warmup_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(angle))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The learning rate as it is. It has no keys."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """Down to `lr_end_ratio` along a power of the steps that are left."""

    power: Annotated[float, Gt(0)] = 1.0
    """1 is a straight line, 2 falls fast at first."""
    lr_end_ratio: Ratio = 0.0
    """Last learning rate as a share of `learning_rate`. transformers gives it as a rate, `lr_end: 1e-7`; divide that by
    your `learning_rate`."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up, `lr_end_ratio` at `total_steps`."""
        left = 1.0 - progress(step, total_steps, warmup_steps)
        return self.lr_end_ratio + (1.0 - self.lr_end_ratio) * left**self.power


@hookimpl
def lr_scheduler_config() -> list[Plugin]:
    """All four schedules."""
    # The validated config is the schedule itself.
    return [
        Plugin(name=name, config=schedule, build=lambda config: config, summary=summary)
        for name, schedule, summary in (
            ("linear", Linear, "Straight down to 0"),
            ("cosine", Cosine, "Down along a cosine"),
            ("constant", Constant, "The same learning rate throughout"),
            ("polynomial", Polynomial, "Down along a power of the steps that are left"),
        )
    ]
