"""Rewards that are wrong in one way each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llmtune import Completion


class CountsToInfinity:
    def score(self, completions: Sequence[Completion], context: Any) -> list[float]:
        return [float(len(each.answer) or "inf") for each in completions]


class GradesOnACurve:
    def score(self, completions: Sequence[Completion], context: Any) -> list[float]:
        lengths = [len(each.ids) for each in completions]
        return [length - sum(lengths) / len(lengths) for length in lengths]


class GrowsTired:
    calls = 0

    def score(self, completions: Sequence[Completion], context: Any) -> list[float]:
        self.calls += 1
        return [len(each.ids) / self.calls for each in completions]


class RollsDice:
    def score(self, completions: Sequence[Completion], context: Any) -> list[float]:
        import torch

        return [len(each.ids) + 0 * torch.rand(()).item() for each in completions]


class FavoursLargeCrowds:
    def score(self, completions: Sequence[Completion], context: Any) -> list[float]:
        return [len(each.ids) * float(os.environ.get("WORLD_SIZE", 1)) for each in completions]
