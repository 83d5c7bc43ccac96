"""Learning rate after warm-up, `lr_scheduler_config`.

Each schedule but `reduce_lr_on_plateau` is a pure function of the step, so a continued run needs no state of it. Values
equal those of transformers' `get_scheduler` at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmtune import Ge, Gt, Le, Plugin, hookimpl

from .plateau import ReduceOnPlateau, ReduceOnPlateauConfig

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
class CosineWithMinLr:
    """transformers' `cosine_with_min_lr`: what `cosine` does with `min_lr_ratio`, under transformers' names of keys."""

    min_lr_rate: Ratio
    """Lowest learning rate as a share of `learning_rate`. transformers' other key, `min_lr`, is a rate; divide that by
    your `learning_rate`."""
    num_cycles: Annotated[float, Gt(0)] = 0.5
    """Waves over the run: 0.5 goes down once, 1 goes down and comes back up."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up, `min_lr_rate` wherever the cosine is lowest."""
        cosine = Cosine(num_cycles=self.num_cycles, min_lr_ratio=self.min_lr_rate)
        return cosine.factor(step, total_steps, warmup_steps)


@dataclass(frozen=True, kw_only=True)
class CosineWithRestarts:
    """Down along a cosine to 0, and again from the top (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""

    num_cycles: Annotated[int, Ge(1)] = 1
    """How often it goes down; 1 is `cosine`."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up and at each restart, 0 at `total_steps`."""
        done = progress(step, total_steps, warmup_steps)
        return 0.0 if done >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (self.num_cycles * done % 1.0)))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Down with the square root of the step (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 5.3)."""

    timescale: Annotated[int, Ge(1)] | None = None
    """Steps after which the rate has fallen by the square root of two. null: the steps of warm-up; without, 10000."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 at the end of warm-up; it never reaches 0."""
        timescale = self.timescale or warmup_steps or 10_000
        return math.sqrt(timescale / (step - warmup_steps + timescale))


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


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Constant for most of the run, then down (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""

    num_decay_steps: Annotated[int, Ge(1)]
    """Steps of the decay at the end of the run, at most all after warm-up."""
    num_stable_steps: Annotated[int, Ge(0)] | None = None
    """Steps between warm-up and decay. null: all that are left. Where the three come to less than the run, it ends at
    `min_lr_ratio`."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """The curve of the decay."""
    min_lr_ratio: Ratio = 0.0
    """Lowest learning rate as a share of `learning_rate`. In transformers warm-up begins there, too: set
    `warmup_start_ratio` for that."""
    num_cycles: Annotated[float, Gt(0)] = 0.5
    """Waves of a cosine decay: 0.5 goes down once."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """1 until the decay begins, then down to `min_lr_ratio`."""
        decay = max(1, min(self.num_decay_steps, total_steps - warmup_steps))
        stable = self.num_stable_steps
        begin = max(warmup_steps, total_steps - decay) if stable is None else warmup_steps + stable
        done = min(1.0, max(0, step - begin) / decay)
        match self.decay_type:
            case "linear":
                left = 1.0 - done
            case "cosine":
                left = 0.5 * (1.0 + math.cos(2.0 * math.pi * self.num_cycles * done)) if done < 1.0 else 0.0
            case "1-sqrt":
                left = 1.0 - math.sqrt(done)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left

    def remarks(self, groups: object, total_steps: int, warmup_steps: int) -> Iterator[str]:
        """A decay for which the run has too few steps."""
        wanted, left = self.num_decay_steps, max(0, total_steps - warmup_steps - (self.num_stable_steps or 0))
        if wanted > left and self.num_stable_steps is None:
            yield f"num_decay_steps: {wanted:,} are more than the {left:,} after warm-up, over which it falls then"
        elif wanted > left:
            yield f"num_decay_steps: the run ends after {left:,} of {wanted:,} steps, before the rate has come down"


def itself(config: Any) -> Any:
    """The schedule of a validated config, which is the config itself."""
    return config


@hookimpl
def lr_scheduler_config() -> list[Plugin]:
    """All schedules."""
    plateau = Plugin(
        name="reduce_lr_on_plateau", config=ReduceOnPlateauConfig, build=ReduceOnPlateau,
        summary="Lower each time that evaluations stop getting better",
    )  # fmt: skip
    return [
        *(
            Plugin(name=name, config=schedule, build=itself, summary=summary)
            for name, schedule, summary in (
                ("linear", Linear, "Straight down to 0"),
                ("cosine", Cosine, "Down along a cosine"),
                ("cosine_with_restarts", CosineWithRestarts, "Down along a cosine, several times"),
                ("cosine_with_min_lr", CosineWithMinLr, "Down along a cosine to a lowest rate"),
                ("inverse_sqrt", InverseSqrt, "Down with the square root of the step"),
                ("constant", Constant, "The same learning rate throughout"),
                ("polynomial", Polynomial, "Down along a power of the steps that are left"),
                ("warmup_stable_decay", WarmupStableDecay, "The same learning rate, then down at the end"),
            )
        ),
        plateau,
    ]
