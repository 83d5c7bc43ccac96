"""What stays in sight while a run trains: where its loss goes, what it takes, what comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
CURVE = 12
"""Columns of the loss since the start."""
RECENT = 20
"""Logged losses that the trend is taken from."""
FEWEST = 5
"""Losses below which no trend is told."""
MAIN = ("reward", "rewards/accuracies", "rewards/margins", "kl")
"""Metrics that say more of preferences and rewards than the loss does: the first two that a run has are shown beside
it, and the first is in the table at the end."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """What is known of a run beforehand. None where there is no such thing."""

    planned_memory_bytes: int | None = None
    eval_every: int | None = None
    """Steps from one evaluation to the next."""
    save_every: int | None = None
    """Steps from one checkpoint to the next."""


@dataclass
class Status:
    """The numbers of the last step that was logged, and of the last evaluation."""

    total: int
    milestones: Milestones
    draws: bool = True
    """Whether the terminal has characters to draw the loss with."""
    losses: list[float] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Take what is logged of a step or an evaluation."""
        self.numbers |= metrics
        if "loss" in metrics and math.isfinite(metrics["loss"]):
            self.losses.append(metrics["loss"])

    def parts(self, step: int) -> Iterator[tuple[str, str]]:
        """(name, text) of each number after `step`; as wide for every step, so that all keep their places."""
        numbers, marks = self.numbers, self.milestones
        if self.losses:
            curve = f" {curve_text(self.losses):<{CURVE}}" if self.draws else ""
            yield "loss", f"{self.losses[-1]:.4f} {trend(self.losses):<7}{curve}"
        for name in [name for name in MAIN if name in numbers][:2]:
            yield name, f"{numbers[name]:<7.4g}"
        if "eval_loss" in numbers:
            yield "eval loss", f"{numbers['eval_loss']:.4f}"
        if "learning_rate" in numbers:
            yield "lr", f"{numbers['learning_rate']:.1e}"
        if "tokens_per_second" in numbers:
            yield "", f"{numbers['tokens_per_second']:>6,.0f} tok/s"
        if "peak_memory_bytes" in numbers:
            planned = f" ({marks.planned_memory_bytes / GIB:.2f} planned)" if marks.planned_memory_bytes else ""
            yield "memory", f"{numbers['peak_memory_bytes'] / GIB:.2f} GiB{planned}"
        for name, every in (("next eval", marks.eval_every), ("next save", marks.save_every)):
            if every and step < self.total:
                yield name, f"{min(self.total, (step // every + 1) * every):<{len(str(self.total))}}"


def trend(losses: Sequence[float]) -> str:
    """Where the last losses go, by the slope of a line through them: `falling` or `rising` where it is more than twice
    its standard error, else `level`; nothing yet for few."""
    last = losses[-RECENT:]
    count = len(last)
    if count < FEWEST:
        return ""
    places = [at - (count - 1) / 2 for at in range(count)]
    mean, spread = sum(last) / count, sum(place * place for place in places)
    slope = sum(place * value for place, value in zip(places, last, strict=True)) / spread
    rest = sum((value - mean - slope * place) ** 2 for place, value in zip(places, last, strict=True))
    error = math.sqrt(rest / (count - 2) / spread)
    if abs(slope) <= 2 * error or slope == 0:
        return "level"
    return "rising" if slope > 0 else "falling"


def curve_text(losses: Sequence[float]) -> str:
    """All losses in at most `CURVE` columns, each the mean of its share, from the lowest to the highest."""
    columns = min(CURVE, len(losses))
    bounds = [at * len(losses) // columns for at in range(columns + 1)]
    means = [sum(losses[low:high]) / (high - low) for low, high in pairwise(bounds)]
    lowest, width = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - lowest) / width * (len(BARS) - 1)) if width else 0] for mean in means)
