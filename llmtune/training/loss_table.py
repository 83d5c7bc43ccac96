"""Metrics of a run as a table of few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.terminal import table_text
from llmtune.training.status import MAIN

COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "d"),
    "epoch": ("epoch", ".2f"),
    "loss": ("loss", ".4f"),
    **{name: (name, ".4g") for name in MAIN},
    "eval_loss": ("eval loss", ".4f"),
    "learning_rate": ("learning rate", ".2e"),
    "grad_norm": ("grad norm", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Metric to (heading, format) of the loss table."""


def loss_table(metrics: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    """At most `most` steps of a run as an aligned table: the first, the last, evenly spaced ones, evaluations."""
    rows = _by_step(metrics)
    if not rows:
        return "No metrics were logged."
    evaluated = [index for index, row in enumerate(rows) if "eval_loss" in row]
    chosen = set(_spread(evaluated, most // 2))
    chosen |= set(_spread(range(len(rows)), most - len(chosen)))
    shown = [rows[index] for index in sorted(chosen)]
    told = [name for name in MAIN if any(row.get(name) is not None for row in shown)][:1]
    columns = [
        [heading, *(format(row[key], form) if row.get(key) is not None else "" for row in shown)]
        for key, (heading, form) in COLUMNS.items()
        if any(row.get(key) is not None for row in shown) and (key in told or key not in MAIN)
    ]
    head, *cells = zip(*columns, strict=True)
    return table_text(head, cells)


def _by_step(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step: training and evaluation metrics of a step together."""
    rows: dict[int, dict[str, Any]] = {}
    for row in metrics:
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of `items`, evenly spaced, the last always and the first if there is room for two."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items)[-1:] if most else []
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
