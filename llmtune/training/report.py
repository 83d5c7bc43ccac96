"""The end of a run, for people: answers side by side, losses, where everything is, what to try next."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from llmtune.planning.devices import GIB
from llmtune.terminal import columns, say, table_text
from llmtune.training.console import duration
from llmtune.training.log import read_metrics

if TYPE_CHECKING:
    from llmtune.training.outcome import Outcome

COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "d"),
    "epoch": ("epoch", ".2f"),
    "loss": ("loss", ".4f"),
    "eval_loss": ("eval loss", ".4f"),
    "learning_rate": ("learning rate", ".2e"),
    "grad_norm": ("grad norm", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Metric to (heading, format) of the loss table."""


def print_outcome(outcome: Outcome) -> None:
    """Show, on the first rank, what a run has come to."""
    if outcome.plan.ranks.first:
        say("\n" + outcome_text(outcome, columns(sys.stdout)))


def outcome_text(outcome: Outcome, width: int | None = None) -> str:
    """What a run has come to. Answers stand in two columns that together take `width`."""
    folder = outcome.plan.output_dir
    if outcome.status == "interrupted":
        return f"Interrupted and saved. Run the same command again to continue: {folder}"
    parts = [side_by_side(question, before, after, width or 100) for question, before, after in outcome.answers]
    parts.append(loss_table(read_metrics(folder)))
    kind = "adapter" if outcome.plan.model.is_adapter else "model"
    parts.append(
        f"Saved the {kind}, tokenizer and chat template in {folder / 'model'},\nmetrics in {folder / 'metrics.jsonl'}."
    )
    parts.append(spent_text(outcome))
    answers = outcome.plan.model.module.get_output_embeddings() is not None
    parts.append("\n".join(["Try next:", *(f"  {command}" for command in next_commands(folder, answers))]))
    return "\n\n".join(parts)


def spent_text(outcome: Outcome) -> str:
    """What the run took, and what the plan expected of its memory."""
    on_gpu = outcome.plan.device.type == "cuda"
    measured = f"{outcome.peak_memory_bytes / GIB:.2f} GiB" + ("" if on_gpu else " with Python and its libraries")
    planned = f"{outcome.planned_memory_bytes / GIB:.2f} GiB planned for tensors"
    return f"Took {duration(outcome.seconds)} in all, and at most {measured} ({planned}) on a rank."


def next_commands(folder: Path, answers: bool = True) -> list[str]:
    """Commands that work where the run was started, to be copied as they are; `answers` says whether the model does."""
    here = Path(os.path.relpath(folder))
    near = here if len(str(here)) < len(str(folder)) else folder
    return [
        f"llmtune chat {shlex.quote(str(near))}" if answers else f"llmtune reward {shlex.quote(str(near))} dataset=...",
        f"llmtune export {shlex.quote(str(near))} export_dir={shlex.quote(str(near / 'merged'))}",
    ]


def loss_table(metrics: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    """At most `most` steps of a run as an aligned table: the first, the last, evenly spaced ones, evaluations."""
    rows = _by_step(metrics)
    if not rows:
        return "No metrics were logged."
    evaluated = [index for index, row in enumerate(rows) if "eval_loss" in row]
    chosen = set(_spread(evaluated, most // 2))
    chosen |= set(_spread(range(len(rows)), most - len(chosen)))
    shown = [rows[index] for index in sorted(chosen)]
    columns = [
        [heading, *(format(row[key], form) if row.get(key) is not None else "" for row in shown)]
        for key, (heading, form) in COLUMNS.items()
        if any(row.get(key) is not None for row in shown)
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


def side_by_side(question: str, before: str, after: str, width: int = 100) -> str:
    """A question and its answers before and after training, in two columns that together take `width` cells."""
    column = max(12, (width - 3) // 2)
    left, right = (wrap(text.strip() or "(nothing)", column) for text in (before, after))
    rows = [
        ("Before training", "After training"), ("-" * column, "-" * column), *zip_longest(left, right, fillvalue="")
    ]  # fmt: skip
    lines = [f"{set_cell_size(old, column)} | {new}".rstrip() for old, new in rows]
    return "\n".join([*wrap(f"Question: {question.strip()}", width), "", *lines])


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` terminal cells, broken at spaces where there are any; line breaks of `text` stay."""
    # Control characters would move the cursor; other kinds of space count as plain ones.
    plain = "\n".join(
        "".join(c if c.isprintable() else " " if c.isspace() else "" for c in line)
        for line in text.expandtabs(4).splitlines()
    )
    return [line.plain.rstrip() for line in Text(plain).wrap(Console(width=width), width, overflow="fold")]
