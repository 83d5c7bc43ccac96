"""Plans and results as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.contract.extension_points import POINTS

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.run import Outcome


def plan_text(plan: Plan) -> str:
    """What will happen, for a person to read before it does."""
    lines = [*_model_lines(plan), "", "Steps, in order", *_edit_lines(plan), "", *_number_lines(plan)]
    if plan.notes:
        lines += ["", *(f"Note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def _model_lines(plan: Plan) -> list[str]:
    rows = [("Model", f"{plan.recipe.model.model} ({type(plan.model).__name__}, from {plan.files.origin})")]
    if plan.files.note:
        rows += [("", line) for line in textwrap.wrap(plan.files.note, 100)]
    if plan.vocabulary is not None:
        rows += zip(("Tokens", ""), plan.vocabulary.lines(), strict=True)
    rows += [
        (
            "Device",
            f"{plan.device.type}, {counted(plan.ranks.size, 'rank')}{_arrangement(plan)}, {plan.precision.name}",
        ),
        ("Attention", f"{plan.attention}, {'documents end to end' if plan.flat else 'padded rows'}"),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def _arrangement(plan: Plan) -> str:
    sizes = {name: size for name, size in vars(plan.ranks.layout).items() if size > 1}
    if set(sizes) <= {"shard"}:
        return ""
    return " (" + " x ".join(f"{name} {size}" for name, size in sizes.items()) + ")"


def counted(number: int, thing: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _edit_lines(plan: Plan) -> list[str]:
    reports = {id(part): [] for part in plan.parts.all}
    edits = [part for part in plan.parts.all if POINTS[part.point].edits]
    for part, (_, change) in zip(edits, plan.ledger.changes, strict=False):
        reports[id(part)] = _grouped(change.report)
    lines = []
    for part in plan.parts.all:
        if part.point == "dist_config" and plan.ranks.size == 1:
            continue
        summary, *more = reports[id(part)] or [part.plugin.summary]
        lines.append(f"  {part.point.removesuffix('_config'):<13}{part.plugin.name:<17}{part.package:<26}{summary}")
        lines += [f"{'':<58}{line}" for line in more]
    return lines


def _grouped(report: Sequence[str]) -> list[str]:
    """`a: why` and `b: why` as `a, b: why`, in the order of first mention."""
    names: dict[str, list[str]] = {}
    for line in report:
        name, _, reason = line.partition(": ")
        names.setdefault(reason or line, []).append(name if reason else "")
    return [f"{', '.join(found)}: {reason}" if any(found) else reason for reason, found in names.items()]


def _number_lines(plan: Plan) -> list[str]:
    trainable, everything = plan.parameters()
    rows = [("Parameters", f"{trainable:,} trainable of {everything:,} ({trainable / everything:.2%})")]
    if plan.feed is not None and plan.data is not None:
        order, micros = plan.feed.order, plan.feed.micro_steps
        tokens, units = int(plan.feed.units.tokens.sum()), plan.feed.units
        rows_each = -(-order.batch // (micros * plan.ranks.batch_ranks))
        split = f"{rows_each} x {micros} micro-batches x {counted(plan.ranks.batch_ranks, 'rank')}"
        # The first rows of a stream stand for all.
        step_tokens = tokens * (min(order.batch, len(units)) if order.steps_per_epoch else order.batch) // len(units)
        what = "packs" if units.kind == "pack" else "pairs" if plan.feed.samples.width == 2 else "rows"
        rows += [
            ("Data", str(plan.data.report).replace("\n", f"\n{'':<12}")),
            *([("Packing", _packing(plan))] if _packing(plan) else []),
            ("Batch", f"{order.batch} {what} a step = {split}, about {step_tokens:,} tokens"),
            ("Steps", f"{plan.steps} ({_epoch(plan)}{plan.warmup_steps} of them warm-up)"),
            ("Output", f"{plan.output_dir}"),
        ]  # fmt: skip
    return [f"{name:<12}{text}" for name, text in rows]


def _epoch(plan: Plan) -> str:
    assert plan.feed is not None and plan.data is not None
    steps, stream = plan.feed.order.steps_per_epoch, plan.data.stream
    if steps is None and stream is not None and stream.rows is not None and not plan.recipe.data.packing:
        return f"{stream.rows / plan.feed.order.batch:.1f} an epoch, "
    return "" if steps is None else f"{steps} an epoch, "


def _packing(plan: Plan) -> str:
    """How samples share rows, or how much is padded where they do not."""
    assert plan.feed is not None
    units = plan.feed.units
    if plan.data is not None and plan.data.stream is not None and units.kind != "sample":
        return f"rows of up to {units.room:,} tokens, " + ("kept apart" if units.kind == "pack" else "end to end")
    match units.kind:
        case "pack":
            return f"{counted(len(units), 'pack')} of up to {units.room:,} tokens, {units.fill:.1%} full, kept apart"
        case "row":
            return f"{counted(len(units), 'row')} of {units.room:,} tokens cut from all samples end to end"
    share = plan.feed.padding
    return f"none; {share:.1%} of what is computed is padding" if share > 0 else ""


def outcome_text(outcome: Outcome) -> str:
    """The end of a run: answers side by side, losses, where everything is, what to try next."""
    from llmtune.training.log import loss_table, read_metrics, side_by_side

    plan = outcome.plan
    folder = plan.output_dir
    if outcome.status == "interrupted":
        return f"Interrupted and saved. Run the same command again to continue: {folder}"
    parts = [side_by_side(question, before, after, 100) for question, before, after in outcome.answers]
    parts.append(loss_table(read_metrics(folder)))
    from llmtune.training.save import is_adapter

    kind = "adapter" if is_adapter(plan) else "model"
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
