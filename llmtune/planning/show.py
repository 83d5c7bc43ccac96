"""Plans as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmtune.contract.errors import counted, listed
from llmtune.contract.extension_points import POINTS
from llmtune.contract.records import Edit
from llmtune.contract.stages import RollsOut, precomputing
from llmtune.planning.edit import EDITORS
from llmtune.planning.further_models import model_names

if TYPE_CHECKING:
    from llmtune.contract.stages import Stage
    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.data_plan import DataPlan
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import Parts


def model_lines(plan: ModelPlan, flat: bool) -> list[str]:
    """Which model this is, where it will be, and how it attends; `flat` says how rows are laid."""
    rows = [("Model", f"{plan.keys.model} ({type(plan.module).__name__}, from {plan.files.origin})")]
    if plan.files.note:
        rows.append(("", plan.files.note))
    if plan.vocabulary is not None:
        rows += zip(("Tokens", ""), plan.vocabulary.lines(), strict=True)
    place = f"{counted(plan.ranks.size, 'rank')}{_arrangement(plan.ranks)}"
    rows += [
        ("Device", f"{plan.device.type}, {place}, {plan.precision.name}"),
        *([("", plan.precision.why)] if plan.precision.why else []),
        ("Attention", f"{plan.attention}, {'documents end to end' if flat else 'padded rows'}"),
        ("Memory", "; ".join(filter(None, [_checkpointing(plan), plan.checkpointing_why]))),
    ]
    return [f"{name:<12}{text}" for name, text in rows]


def parameter_lines(plan: ModelPlan) -> list[str]:
    """Every parameter, where the recipe asks for them: its name, type, shape, and whether it trains."""
    if not plan.keys.print_param_status:
        return []
    width = max(len(name) for name, _ in plan.module.named_parameters())
    return ["", "Parameters"] + [
        f"  {name:<{width}}  {str(p.dtype).removeprefix('torch.'):<9} {'trains' if p.requires_grad else 'frozen'}  "
        f"{' x '.join(map(str, p.shape))}"
        for name, p in plan.module.named_parameters()
    ]


def further_lines(parts: Parts, further: Mapping[str, ModelPlan]) -> list[str]:
    """The further models of the stage and of rewards, and whether they take memory of their own."""
    rows = []
    when = "; asked once, before training" if precomputing(parts.one("stage_config").built) else ""
    for name in model_names(parts):
        plan = further.get(name)
        text = f"{_named(plan)}, {plan.parameters()[1]:,} parameters" if plan else "the base, with its adapters off"
        rows.append((name.rpartition(" ")[2].capitalize(), text + when))
    return [f"{name:<12}{text}" for name, text in rows]


def _named(plan: ModelPlan) -> str:
    folders = sorted({str(path.parent) for path in plan.ledger.read_files()})
    return f"{plan.keys.model} with {listed(folders)}" if folders else plan.keys.model


def _checkpointing(plan: ModelPlan) -> str:
    return f"activation checkpointing {plan.checkpointing}" + (", kept in host memory" if plan.offloads else "")


def _arrangement(ranks: Ranks) -> str:
    sizes = {name: size for name, size in vars(ranks.dims).items() if size > 1}
    if set(sizes) <= {"shard"}:
        return ""
    return " (" + " x ".join(f"{name} {size}" for name, size in sizes.items()) + ")"


def edit_lines(parts: Parts, plan: ModelPlan) -> list[str]:
    """Each plugin of the recipe, in the order in which they act, and what it did to the model."""
    reports = {id(part): [] for part in parts.all}
    edits = [part for point in EDITORS for part in parts.at(point) if isinstance(part.built, Edit)]
    for part, (_, change) in zip(edits, plan.ledger.changes, strict=True):
        reports[id(part)] = _grouped(change.report)
    idle = {"dist_config", "launch_config"} if plan.ranks.size == 1 else set()
    idle |= {"hub_config"} if plan.files.origin != "hub" else set()
    lines = []
    for part in parts.all:
        if part.plugin.name == POINTS[part.point].default and part.point in idle:
            continue
        summary, *more = reports[id(part)] or [part.plugin.summary]
        name = f"{part.plugin.name} ({part.package})"
        lines.append(f"  {part.point.removesuffix('_config'):<14}{name}: {summary}")
        lines += [f"{'':<16}{line}" for line in more]
    return lines


def _grouped(report: Sequence[str]) -> list[str]:
    """`a: why` and `b: why` as `a, b: why`, in the order of first mention."""
    names: dict[str, list[str]] = {}
    for line in report:
        name, _, reason = line.partition(": ")
        names.setdefault(reason or line, []).append(name if reason else "")
    return [f"{', '.join(found)}: {reason}" if any(found) else reason for reason, found in names.items()]


def data_lines(plan: DataPlan, ranks: Ranks, stage: Stage) -> list[tuple[str, str]]:
    """(title, text) of the data: what they are, how samples share rows, what a step takes of them, and what answers it
    gives to them."""
    batches, order, units = plan.batches, plan.batches.order, plan.batches.units
    rows_each = -(-order.batch // (batches.micro_steps * ranks.batch_ranks))
    split = f"{rows_each} x {_micro_batches(batches.micro_steps)} x {counted(ranks.batch_ranks, 'rank')}"
    # The first rows of a stream stand for all.
    tokens, some = int(units.tokens.sum()), min(order.batch, len(units)) if order.steps_per_epoch else order.batch
    what = "pack" if units.kind == "pack" else "pair" if batches.samples.width == 2 else "row"
    packing = _packing(plan)
    return [
        ("Data", str(plan.prepared.report).replace("\n", f"\n{'':<12}")),
        *([("Packing", packing)] if packing else []),
        ("Batch", f"{counted(order.batch, what)} a step = {split}, about {tokens * some // len(units):,} tokens"),
        *([("Answers", _answers(stage, order.batch))] if isinstance(stage, RollsOut) else []),
    ]


def _micro_batches(number: int) -> str:
    return "1 micro-batch" if number == 1 else f"{number:,} micro-batches"


def _answers(stage: RollsOut, prompts: int) -> str:
    updates = f", {counted(stage.updates, 'update')} of the weights from them" if stage.updates > 1 else ""
    return f"{prompts * stage.splits} a step, each of up to {counted(stage.answer_tokens, 'token')}{updates}"


def epoch_text(plan: DataPlan, packing: bool) -> str:
    """How many steps an epoch has, as far as that is known."""
    order, stream = plan.batches.order, plan.prepared.stream
    if order.steps_per_epoch is not None:
        return f"{order.steps_per_epoch} an epoch, "
    if stream is not None and stream.rows is not None and not packing:
        return f"{stream.rows / order.batch:.1f} an epoch, "
    return ""


def _packing(plan: DataPlan) -> str:
    """How samples share rows, or how much is padded where they do not."""
    units = plan.batches.units
    if plan.prepared.stream is not None and units.kind != "sample":
        return f"rows of up to {units.room:,} tokens, " + ("kept apart" if units.kind == "pack" else "end to end")
    match units.kind:
        case "pack":
            return f"{counted(len(units), 'pack')} of up to {units.room:,} tokens, {units.fill:.1%} full, kept apart"
        case "row":
            return f"{counted(len(units), 'row')} of {units.room:,} tokens cut from all samples end to end"
    share = plan.batches.padding
    return f"none; {share:.1%} of what is computed is padding" if share > 0 else ""
