"""How several data sets become one epoch: a pure function of their sizes and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.contract.errors import DataError

if TYPE_CHECKING:
    from llmtune.data.config import DataConfig
    from llmtune.data.tokens import TokenSamples

_DRAWS = 1 << 16
"""Drawn at a time, then as many again as there are."""
_MOST = 2**31
"""Samples of an epoch, 16 GB of numbers."""


def mixed(samples: TokenSamples, config: DataConfig, seed: int) -> TokenSamples:
    """The samples of an epoch under `mix_strategy`; tokens stay where they are.

    Raises:
        DataError: a data set that is drawn from has no samples.
    """
    if config.mix_strategy == "concat" or samples.sets is None or len(samples.set_names) < 2:
        return samples
    sizes = np.bincount(samples.sets, minlength=len(samples.set_names))
    if not sizes.all():
        name = samples.set_names[int(np.argmin(sizes))]
        raise DataError(f'mix_strategy: "{name}" has no samples to draw; leave it out of dataset, or set concat')
    sets, turns = draw(
        sizes.tolist(), over=config.mix_strategy == "interleave_over", probabilities=config.interleave_probs, seed=seed
    )
    pool = np.empty(len(sets), dtype=np.int64)
    for number in range(len(sizes)):
        own = np.flatnonzero(samples.sets == number)
        if not config.disable_shuffling:  # so that what is left out, or taken once more, is drawn, too
            own = own[np.random.default_rng([seed, 2**31 + 3, number]).permutation(len(own))]
        drawn = sets == number
        pool[drawn] = own[turns[drawn]]
    return samples.select(pool)


def draw(
    sizes: Sequence[int], *, over: bool, probabilities: Sequence[float] | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw from sets of these sizes, in turn or by `probabilities`, until the first of them is used up; or `over`,
    until all are, those used up starting again.

    Returns:
        (draws,) the set of each draw, and (draws,) the place in it.
    """
    if probabilities is None:
        turns = max(sizes) if over else min(sizes)
        sets = np.tile(np.arange(len(sizes)), turns)
        places = np.repeat(np.arange(turns), len(sizes))
        return sets, places % np.asarray(sizes)[sets]
    rng = np.random.default_rng([seed, 2**31 + 1])
    shares = np.asarray(probabilities, dtype=np.float64)
    if over and (expected := float((np.asarray(sizes) / shares).max())) > _MOST:
        raise DataError(
            f"interleave_probs: an epoch would have about {expected:.0e} samples before each set was used up; "
            "raise those that are smallest for their set's size, or set mix_strategy: interleave_under"
        )
    chosen = np.zeros(0, dtype=np.int64)
    # The size of an epoch is found, not set: draw until the last (or first) set has been drawn as often as it has rows.
    while True:
        chosen = np.concatenate(
            [chosen, rng.choice(len(sizes), size=max(_DRAWS, len(chosen)), p=shares / shares.sum())]
        )
        ends = [_used_up(chosen, number, size) for number, size in enumerate(sizes)]
        known = [end for end in ends if end is not None]
        if (len(known) == len(sizes)) if over else known:
            break
    sets = chosen[: max(known) if over else min(known)]
    places = np.empty(len(sets), dtype=np.int64)
    for number, size in enumerate(sizes):
        mine = sets == number
        places[mine] = np.arange(int(mine.sum())) % size
    return sets, places


def _used_up(chosen: np.ndarray, number: int, size: int) -> int | None:
    """Draws until the set has been drawn `size` times."""
    at = np.flatnonzero(chosen == number)
    return int(at[size - 1]) + 1 if len(at) >= size else None


def counts(mixed: TokenSamples, samples: TokenSamples) -> list[str]:
    """How many of each set's samples an epoch has, in words; empty where nothing was mixed."""
    if mixed is samples or mixed.sets is None or samples.sets is None:
        return []
    size = len(samples.set_names)
    drawn, there = np.bincount(mixed.sets, minlength=size).tolist(), np.bincount(samples.sets, minlength=size).tolist()
    return [f"{n:,} of {name} ({has:,})" for name, n, has in zip(samples.set_names, drawn, there, strict=True)]
