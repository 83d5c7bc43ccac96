"""What a process knows at the end of a run, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmtune.training.log import loss_table, read_metrics, side_by_side

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.objective import Objective


@dataclass(frozen=True)
class Outcome:
    """The end of a run, as one process knows it."""

    plan: Plan
    status: str
    """`done`, or `interrupted` (saved; run the same command again)."""
    objective: Objective
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer before, answer after) of the recipe's `sample_prompts`."""


def outcome_text(outcome: Outcome) -> str:
    """The end of a run: answers side by side, losses, where everything is, what to try next."""
    plan = outcome.plan
    folder = plan.output_dir
    if outcome.status == "interrupted":
        return f"Interrupted and saved. Run the same command again to continue: {folder}"
    parts = [side_by_side(question, before, after, 100) for question, before, after in outcome.answers]
    parts.append(loss_table(read_metrics(folder)))
    kind = "adapter" if plan.model.is_adapter else "model"
    parts.append(
        "\n".join(
            [
                f"Saved the {kind}, tokenizer and chat template in {folder / 'model'},",
                f"metrics in {folder / 'metrics.jsonl'}.",
                "Try next:",
                f"  llmtune chat {folder}",
                f"  llmtune export {folder} export_dir={folder / 'merged'}",
                "  llmtune plan recipes/lora.yaml",
            ]
        )
    )
    return "\n\n".join(parts)
