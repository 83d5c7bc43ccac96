"""The contract of evaluation: what a model said to a row, to be compared with the answer that the row has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answered to the question of a row; a line of `generated_predictions.jsonl`."""

    row: str
    """Where the row stands: `path:line` or `path:row N`."""
    prompt: str
    """What the model was asked, as the template writes it."""
    predict: str
    """The model's answer."""
    label: str | None
    """The row's own answer; None where it has none."""
    cut: bool
    """Whether the answer was ended by the limit of its length."""
