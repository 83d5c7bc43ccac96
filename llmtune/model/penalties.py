"""Logits are changed as OpenAI's API defines it: by a bias for tokens, and by what an answer has said.

B rows · V vocabulary
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor


def biased(logits_BV: Tensor, biases: Sequence[Mapping[int, float]]) -> Tensor:
    """The logits with each row's biases of tokens added."""
    if not any(biases):
        return logits_BV
    found_BV = logits_BV.clone()
    for at, bias in enumerate(biases):
        _add(found_BV[at], bias)
    return found_BV


class SaidPenalty(NamedTuple):
    """What a row's answer has said, and what that takes from logits."""

    said: Sequence[int]
    presence: float
    """Taken from each token that was said."""
    frequency: float
    """Taken from each as many times as it was said."""


class SaidPenalties(LogitsProcessor):
    """Makes tokens less likely that answers have said. Prompts do not count."""

    def __init__(self, rows: Sequence[SaidPenalty]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not any(row.presence or row.frequency for row in self.rows):
            return scores
        found_BV = scores.clone()
        for at, row in enumerate(self.rows):
            if row.presence or row.frequency:
                counts = Counter(row.said)
                _add(found_BV[at], {token: -row.presence - row.frequency * count for token, count in counts.items()})
        return found_BV


def _add(logits_V: Tensor, added: Mapping[int, float]) -> None:
    tokens = torch.tensor(list(added), dtype=torch.long, device=logits_V.device)
    logits_V[tokens] += torch.tensor(list(added.values()), dtype=logits_V.dtype, device=logits_V.device)
