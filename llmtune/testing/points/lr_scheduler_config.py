"""Laws of schedules: a pure function, between 0 and 1, that takes over where warm-up ends."""

from __future__ import annotations

import math
from pathlib import Path

from llmtune.testing.contract import Broken, Check, Subject

LENGTHS = ((40, 0), (40, 7), (1, 0), (11, 10), (1000, 30))
"""(steps of the run, steps of warm-up)."""


def laws(subject: Subject) -> list[Check]:
    """All of them."""
    return [stays_within_bounds, takes_over_after_warmup, is_a_pure_function, survives_the_edges]


def stays_within_bounds(subject: Subject, folder: Path) -> None:
    """`factor` is a finite number from 0 to 1: `learning_rate` is the highest rate of a run."""
    schedule = subject.built()
    for total, warmup in LENGTHS:
        for step in range(warmup, total):
            found = schedule.factor(step, total, warmup)
            if not (isinstance(found, (int, float)) and math.isfinite(found) and 0 <= found <= 1 + 1e-9):
                raise Broken(f"factor({step}, {total}, {warmup}) is {found!r}", "Return a number from 0 to 1")


def takes_over_after_warmup(subject: Subject, folder: Path) -> None:
    """At the first step after warm-up the factor is 1, which warm-up has risen to."""
    schedule = subject.built()
    for total, warmup in LENGTHS:
        found = schedule.factor(warmup, total, warmup)
        if not math.isclose(found, 1.0, rel_tol=1e-6):
            raise Broken(
                f"factor({warmup}, {total}, {warmup}) is {found!r}, so the rate jumps there",
                "Count progress from `warmup_steps`; warming up is the core's",
            )


def is_a_pure_function(subject: Subject, folder: Path) -> None:
    """The same step gives the same factor in any order and from any instance: a continued run knows nothing else."""
    first, second = subject.built(), subject.built()
    for total, warmup in LENGTHS:
        steps = list(range(warmup, total))
        forward = {step: first.factor(step, total, warmup) for step in steps}
        backward = {step: second.factor(step, total, warmup) for step in reversed(steps)}
        if odd := [step for step in steps if forward[step] != backward[step]]:
            raise Broken(f"factor({odd[0]}, {total}, {warmup}) depends on earlier calls", "Keep no state")


def survives_the_edges(subject: Subject, folder: Path) -> None:
    """Runs of one step, warm-up over the whole run, and a step beyond the last are answered with a finite number."""
    schedule = subject.built()
    for step, total, warmup in ((0, 1, 0), (5, 5, 5), (1, 1, 1), (40, 40, 0), (55, 40, 4)):
        found = schedule.factor(step, total, warmup)
        if not (math.isfinite(found) and found >= 0):
            raise Broken(f"factor({step}, {total}, {warmup}) is {found!r}", "Clamp progress to 1")
