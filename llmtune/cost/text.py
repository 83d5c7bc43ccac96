"""Costs as text and as a table for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from llmtune.planning.devices import size_text
from llmtune.planning.memory import CATEGORIES, Estimate

if TYPE_CHECKING:
    from llmtune.cost.advice import Advice, Suggestion
    from llmtune.cost.figures import Figures

TITLES = {"gathered": "in transit", "optimizer": "optimiser"}
MOMENTS = {
    "answers": "answering",
    "start": "before forward",
    "loss": "the loss",
    "update": "the update",
    "towers": "the towers",
}


def quick_text(cost: Figures) -> str:
    """What is known at once."""
    shape, device, quick = cost.shape, cost.device, cost.quick
    batch = f"{shape.rows} x {shape.length:,} tokens, {shape.targets:,} with a loss"
    if shape.micro_steps > 1:
        batch += f", {shape.micro_steps} a step"
    rank = "the rank" if cost.plan.ranks.size == 1 else f"each of {cost.plan.ranks.size} ranks"
    room = f"{size_text(device.memory)}, {size_text(device.usable)} for tensors"
    peak = f"{size_text(quick.at_peak.total)}, largest in {MOMENTS.get(quick.moment, quick.moment)}"
    return f"Memory of {rank} on {device.name} ({room})\n  {'micro-batch':<14}{batch}\n  {'by formulas':<14}{peak}"


def detail_text(cost: Figures, advice: Advice | None) -> str:
    """What takes seconds: the traced figures, FLOPs, the verdict."""
    traced = f"{size_text(cost.traced.at_peak.total)}, on fake tensors" if cost.traced else "not possible here "
    lines = [f"  {'traced':<14}{traced}{f'({cost.untraced})' if cost.untraced else ''}", ""]
    lines += [f"  {a:<14}{b:>14}{c:>14}" for a, b, c in rows(cost.memory)]
    return "\n".join([*lines, "", *speed(cost), "", *verdict(cost, advice)])


def rows(found: Estimate) -> list[tuple[str, str, str]]:
    """Title, at the peak, and at most, by category."""
    lines = [("", f"in {MOMENTS.get(found.moment, found.moment)}", "at most")]
    for name in CATEGORIES:
        now, most = vars(found.at_peak)[name], vars(found.most)[name]
        if most:
            lines.append((TITLES.get(name, name), size_text(now), size_text(most)))
    lines.append(("peak", size_text(found.at_peak.total), ""))
    if found.most.host:
        lines.append(("in host memory", size_text(found.at_peak.host), size_text(found.most.host)))
    return lines


def speed(cost: Figures) -> list[str]:
    """FLOPs and time, and what the end takes."""
    flops, mfu = cost.flops, cost.flops.expected_mfu
    lines = [
        f"  {'FLOPs':<14}{flops.total / 1e9:,.2f} G a token ({flops.forward / 1e9:,.2f} forward, "
        f"{flops.backward / 1e9:,.2f} backward)"
    ]
    if (seconds := cost.step_seconds(mfu)) is not None:
        tokens = cost.step_tokens / seconds * cost.plan.ranks.size
        lines.append(
            f"  {'Time':<14}{seconds:,.3g} s a step, {tokens:,.0f} tokens/s at the assumed MFU of {mfu:.0%}; "
            f"{cost.step_seconds(1.0):,.3g} s at 100 %"
        )
    if cost.result_bytes:
        lines.append(
            f"  {'Result':<14}{size_text(cost.result_bytes)} of host memory on rank 0 while the model is written"
        )
    return lines


def verdict(cost: Figures, advice: Advice | None) -> list[str]:
    """Whether it fits, and what to change."""
    peak, usable = cost.memory.at_peak.total, cost.device.usable
    if advice is None:
        return [f"Fits: {size_text(peak)} of {size_text(usable)} ({peak / usable:.0%})."]
    lines = [f"DOES NOT FIT: {size_text(peak)} of {size_text(usable)}, {size_text(peak - usable)} too much."]
    for same, title in ((True, "Same result:"), (False, "Trains something else:")):
        found = [suggestion for suggestion in advice.single if suggestion.change.same is same]
        lines += [title, *map(_suggestion, found)] if found else []
    if advice.together:
        lines += ["No single change is enough; together these are:", _suggestion(advice.together)]
    elif not any(suggestion.fits for suggestion in advice.single):
        lines.append("Nothing that llmtune knows makes it fit; use a larger device or a smaller model.")
    return lines


def _suggestion(found: Suggestion) -> str:
    return f"  {size_text(found.peak):>12}  {'fits' if found.fits else 'not yet':<8}  {found.change}"


def remedy_lines(cost: Figures, better: Sequence[Suggestion]) -> list[str]:
    """What a step takes, and changes in the order in which to try them, for a run whose memory is exhausted."""
    ranks = cost.plan.ranks.size
    table = [f"  {name:<16}{now:>12}" for name, now, _ in rows(cost.memory if ranks == 1 else cost.quick)[1:]]
    lines = [f"By the plan a step takes on each rank, of {size_text(cost.device.usable)}:", *table]
    if ranks > 1:
        return [*lines, f"`llmtune plan RECIPE --ranks {ranks}` says what would help, in order"]
    tries = [f"  {each.change}, for a peak of {size_text(each.peak)}" for each in better]
    return [*lines, "Try, in this order:", *tries]


def table_html(cost: Figures, advice: Advice | None) -> str:
    """The same as a table."""
    head, *body = rows(cost.memory)
    table = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in [("th", head), *(("td", row) for row in body)]
    )
    below = "\n".join([*speed(cost), "", *verdict(cost, advice)])
    return f"<pre>{escape(quick_text(cost))}</pre><table>{table}</table><pre>{escape(below)}</pre>"
