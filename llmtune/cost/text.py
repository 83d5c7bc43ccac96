"""Costs as text and as a table for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from llmtune.cost.memory import CATEGORIES, Estimate
from llmtune.planning.devices import GIB

if TYPE_CHECKING:
    from llmtune.cost.advice import Suggestion
    from llmtune.cost.estimate import Cost

TITLES = {"gathered": "in transit", "optimizer": "optimiser"}
REMEDIES = 5
"""Changes that are named to a run whose memory is exhausted."""
MOMENTS = {"start": "before forward", "loss": "the loss", "update": "the update"}


def size(count: float) -> str:
    """`12.34 GiB`, `56.7 MiB`."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def quick_text(cost: Cost) -> str:
    """What is known at once."""
    shape, device, total = cost.shape, cost.device, cost.quick.at_peak.total
    batch = f"{shape.rows} x {shape.length:,} tokens, {shape.targets:,} with a loss"
    if cost.shape.micro_steps > 1:
        batch += f", {shape.micro_steps} a step"
    rank = "the rank" if cost.plan.ranks.size == 1 else f"each of {cost.plan.ranks.size} ranks"
    return "\n".join(
        [
            f"Memory of {rank} on {device.name} ({size(device.memory)}, {size(device.usable)} for tensors)",
            f"  {'micro-batch':<14}{batch}",
            f"  {'by formulas':<14}{size(total)}, largest in {MOMENTS.get(cost.quick.moment, cost.quick.moment)}",
        ]
    )


def cost_text(cost: Cost) -> str:
    """Everything."""
    return f"{quick_text(cost)}\n{detail_text(cost)}"


def detail_text(cost: Cost) -> str:
    """What takes seconds: the traced figures, FLOPs, the verdict."""
    lines = []
    if cost.traced is None:
        lines.append(f"  {'traced':<14}not possible here ({cost.untraced})")
    else:
        lines.append(f"  {'traced':<14}{size(cost.traced.at_peak.total)}, on fake tensors")
    lines += ["", *(f"  {a:<14}{b:>14}{c:>14}" for a, b, c in rows(cost.memory)), "", *speed(cost), "", *verdict(cost)]
    return "\n".join(lines)


def rows(found: Estimate) -> list[tuple[str, str, str]]:
    """Title, at the peak, and at most, by category."""
    lines = [("", f"in {MOMENTS.get(found.moment, found.moment)}", "at most")]
    for name in CATEGORIES:
        now, most = getattr(found.at_peak, name), getattr(found.most, name)
        if most:
            lines.append((TITLES.get(name, name), size(now), size(most)))
    lines.append(("peak", size(found.at_peak.total), ""))
    if found.most.host:
        lines.append(("in host memory", size(found.at_peak.host), size(found.most.host)))
    return lines


def speed(cost: Cost) -> list[str]:
    """FLOPs and time."""
    flops, mfu = cost.flops, cost.flops.expected_mfu
    lines = [
        f"  {'FLOPs':<14}{flops.total / 1e9:,.2f} G a token ({flops.forward / 1e9:,.2f} forward, "
        f"{flops.backward / 1e9:,.2f} backward)"
    ]
    if (seconds := cost.step_seconds(mfu)) is not None:
        tokens = cost.step_tokens / seconds * cost.plan.ranks.size
        lines.append(
            f"  {'Time':<14}{seconds:,.2f} s a step, {tokens:,.0f} tokens/s at the assumed MFU of {mfu:.0%}; "
            f"{cost.step_seconds(1.0):,.2f} s at 100 %"
        )
    return lines


def verdict(cost: Cost) -> list[str]:
    """Whether it fits, and what to change."""
    peak, usable = cost.memory.at_peak.total, cost.device.usable
    if cost.fits:
        return [f"Fits: {size(peak)} of {size(usable)} ({peak / usable:.0%})."]
    lines = [f"DOES NOT FIT: {size(peak)} of {size(usable)}, {size(peak - usable)} too much."]
    advice = cost.advice
    assert advice is not None
    for same, title in ((True, "Same result:"), (False, "Trains something else:")):
        found = [suggestion for suggestion in advice.single if suggestion.change.same is same]
        lines += [title, *map(_suggestion, found)] if found else []
    if advice.together:
        lines += ["No single change is enough; together these are:", _suggestion(advice.together)]
    elif not any(suggestion.fits for suggestion in advice.single):
        lines.append("Nothing that llmtune knows makes it fit; use a larger device or a smaller model.")
    return lines


def remedy_lines(cost: Cost) -> list[str]:
    """What a step takes, and changes in the order in which to try them, for a run whose memory is exhausted."""
    from llmtune.cost.advice import advise

    ranks = cost.plan.ranks.size
    found = cost.memory if ranks == 1 else cost.quick  # tracing ranks needs a process group, and the run has its own
    table = [f"  {name:<16}{now:>12}" for name, now, _ in rows(found)[1:]]
    lines = [f"By the plan a step takes on each rank, of {size(cost.device.usable)}:", *table]
    if ranks > 1:
        return [*lines, f"`llmtune plan RECIPE --ranks {ranks}` says what would help, in order"]
    better = advise(cost).single[:REMEDIES]
    return [*lines, "Try, in this order:", *(f"  {each.change}, for a peak of {size(each.peak)}" for each in better)]


def _suggestion(found: Suggestion) -> str:
    return f"  {size(found.peak):>12}  {'fits' if found.fits else 'not yet':<8}  {found.change}"


def cost_html(cost: Cost) -> str:
    """The same as a table."""
    head, *body = rows(cost.memory)
    table = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in [("th", head), *(("td", row) for row in body)]
    )
    below = "\n".join([*speed(cost), "", *verdict(cost)])
    return f"<pre>{escape(quick_text(cost))}</pre><table>{table}</table><pre>{escape(below)}</pre>"
