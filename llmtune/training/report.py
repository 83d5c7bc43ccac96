"""The end of a run, for people: answers side by side, losses, where everything is, what to try next."""

from __future__ import annotations

import os
import shlex
import sys
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from llmtune.planning.devices import GIB
from llmtune.terminal import columns, say
from llmtune.training.console import duration
from llmtune.training.log import read_metrics
from llmtune.training.loss_table import loss_table

if TYPE_CHECKING:
    from llmtune.training.outcome import Outcome


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
