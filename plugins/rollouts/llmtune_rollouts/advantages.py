"""How much better a token was than expected (Schulman et al. 2016, arXiv 1506.02438). N targets · S answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from llmtune import StageContext

SMALL = 1e-8
"""Added to a variance that is divided by, as TRL does."""


def gae(rewards_N: Tensor, values_N: Tensor, said_by_N: Tensor, gamma: float, lam: float) -> Tensor:
    """(N,) advantages: the discounted sum of `reward + gamma * next value - value` from each token to the end of its
    answer, after which nothing comes. `said_by_N` is the number of each target's answer, whose targets follow one
    another."""
    advantages_N = torch.zeros_like(rewards_N)
    if not len(said_by_N):
        return advantages_N
    lengths_S = torch.bincount(said_by_N)
    starts_S = lengths_S.cumsum(0) - lengths_S
    ahead_S = rewards_N.new_zeros(len(lengths_S))
    next_value_S = torch.zeros_like(ahead_S)
    for place in range(int(lengths_S.max()) - 1, -1, -1):
        there = (lengths_S > place).nonzero().squeeze(1)
        spots = starts_S.index_select(0, there) + place
        value = values_N.index_select(0, spots)
        surprise = rewards_N.index_select(0, spots) + gamma * next_value_S.index_select(0, there) - value
        ahead_S[there] = surprise + gamma * lam * ahead_S.index_select(0, there)
        next_value_S[there] = value
        advantages_N[spots] = ahead_S.index_select(0, there)
    return advantages_N


class Moments(NamedTuple):
    """Of numbers on all ranks."""

    count: float
    mean: float
    variance: float
    """Around the mean, divided by the count; 0 where there are no numbers."""

    @property
    def sample_variance(self) -> float:
        """Divided by one less, as an estimate from a sample."""
        return self.variance * self.count / max(1.0, self.count - 1)


def moments(parts: Sequence[Tensor], context: StageContext) -> Moments:
    """Of the numbers in all parts of all ranks. Collective."""
    values = torch.cat(list(parts)).double()
    count, total = context.total(torch.stack([values.new_tensor(float(len(values))), values.sum()])).tolist()
    mean = total / max(1.0, count)
    squares = context.total((values - mean).square().sum()).item()
    return Moments(count, mean, squares / max(1.0, count))


def whitened(parts: Sequence[Tensor], context: StageContext, shift: bool = True) -> list[Tensor]:
    """The numbers divided by their deviation over all parts and ranks, around 0, or without `shift` around their mean.
    Collective."""
    found = moments(parts, context)
    scale = (found.sample_variance + SMALL) ** -0.5
    return [(values - found.mean) * scale + (0.0 if shift else found.mean) for values in parts]
