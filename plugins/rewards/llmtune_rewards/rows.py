"""Rows that lack what a reward reads: those of a stream are first seen when their answers are scored."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune import Completion, DataError, ReadsRows


def require_columns(reward: ReadsRows, name: str, completions: Sequence[Completion]) -> None:
    """DataError for the first answer to a row that `row_objection` finds something lacking in."""
    for completion in completions:
        if objection := reward.row_objection(completion.columns):
            raise DataError(f"reward_config {name}: the row of the prompt {completion.prompt[-80:]!r} {objection}")
