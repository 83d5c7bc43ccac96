"""Laws of stages: the loss is a sum, its gradient is its gradient, and nothing but the batch decides it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtune.contract.losses import StageLoss
from llmtune.contract.stages import Batch, RollsOut
from llmtune.data.batch_loader import other_answers
from llmtune.data.batches import to_device
from llmtune.model.edits import named_tensors
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points import edits
from llmtune.testing.points.edits import same_bytes
from llmtune.training.objective import prepared

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan


def laws(subject: Subject) -> list[Check]:
    """All; those on several ranks where they can be started."""
    found = [
        returns_a_loss, is_a_sum_over_rows, ignores_padding, has_the_gradient_of_its_loss, changes_nothing,
        does_not_depend_on_micro_batches, learns,
    ]  # fmt: skip
    return found + ([edits.same_on_ranks] if subject.spreads else [])


def returns_a_loss(subject: Subject, folder: Path) -> None:
    """`loss` returns a `StageLoss`: a finite scalar in float32 with a graph, and detached scalars as metrics."""
    plan, objective = running.start(subject.keys(folder))
    found = objective(_batch(plan, objective, [0, 1, 2])[0])
    if not isinstance(found, StageLoss):
        raise Broken(f"it returned {type(found).__name__}", "Return StageLoss(total=...)")
    if found.total.dim() or found.total.dtype != torch.float32 or not math.isfinite(float(found.total.detach())):
        kind = f"{list(found.total.shape)} {found.total.dtype}, {found.total.detach().flatten()[:3].tolist()}"
        raise Broken(f"`total` is {kind}", "Return one finite float32 number")
    if not found.total.requires_grad:
        raise Broken("`total` has no graph, so nothing would be learnt", "Do not detach it or use no_grad")
    if odd := [name for name, value in found.sums().items() if name != "loss" and (value.requires_grad or value.dim())]:
        raise Broken(f"the metrics {names(odd)} are not detached scalars", "Give summed numbers with .detach()")


def is_a_sum_over_rows(subject: Subject, folder: Path) -> None:
    """Loss and metrics of a batch are the sums of its rows': the loop divides by the weight of the whole step."""
    plan, objective = running.start(subject.keys(folder))
    rows = [0, 1, 2, 5, 8]
    together = _numbers(objective, _batch(plan, objective, rows))
    alone = _numbers(objective, _batches(plan, objective, [[row] for row in rows]))
    for name, value in together.items():
        total = alone[name]
        if not math.isclose(value, total, rel_tol=subject.tolerance, abs_tol=1e-5):
            raise Broken(
                f"{name} of {len(rows)} rows is {value:.6g}, their sum one by one {total:.6g}",
                "Sum over the batch; do not take means",
            )


def ignores_padding(subject: Subject, folder: Path) -> None:
    """More padding, and rows laid end to end instead of padded, change nothing."""
    plan, objective = running.start(subject.keys(folder))
    rows = [0, 1, 2, 5]
    padded = _batch(plan, objective, rows)
    expected = _numbers(objective, padded)
    layouts: dict[str, Sequence[Batch]] = {
        "with 7 more tokens of padding": [_padded_more(batch, 7) for batch in padded]
    }
    layouts["with rows laid end to end"] = _batch(plan, objective, rows, flat=True)
    for what, batches in layouts.items():
        for name, value in _numbers(objective, batches).items():
            if not math.isclose(value, expected[name], rel_tol=10 * subject.tolerance, abs_tol=1e-5):
                raise Broken(
                    f"{what} the {name} is {value:.6g} instead of {expected[name]:.6g}",
                    "Count what `predict_at` and `targets` name, or labels that are not -100",
                )


def has_the_gradient_of_its_loss(subject: Subject, folder: Path) -> None:
    """The gradient agrees with finite differences of the loss, along random directions."""
    plan, objective = running.start(subject.keys(folder))
    batches = _batch(plan, objective, [0, 1, 2])
    objective.eval()
    for batch in batches:
        objective(batch).total.backward()
    trained = [(p, p.grad) for p in plan.model.module.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(3)
    step = 5e-3  # as a length: small against the weights, large against float32's rounding of the loss
    for _ in range(3):
        # The gradient and as much noise: a direction along which the slope is large enough to be seen.
        noise = [torch.randn(g.shape, generator=generator).to(g.device) * g.square().mean().sqrt() for _, g in trained]
        along = [grad + some for (_, grad), some in zip(trained, noise, strict=True)]
        size = math.sqrt(sum(float(direction.square().sum()) for direction in along)) or 1.0
        slope = sum(float((g * d).sum()) for (_, g), d in zip(trained, along, strict=True)) / size
        parameters = [parameter for parameter, _ in trained]
        there, back = (_moved(objective, batches, parameters, along, sign * step / size) for sign in (1, -1))
        found = (there - back) / (2 * step)
        if not math.isclose(found, slope, rel_tol=0.03):
            raise Broken(
                f"along a direction the loss rises by {found:.4g}, its gradient says {slope:.4g}",
                "Look for parts of the loss that are detached, rounded, or computed under no_grad",
            )


def changes_nothing(subject: Subject, folder: Path) -> None:
    """Computing the loss leaves weights, buffers, the batch and the training mode as they were, and repeats itself."""
    plan, objective = running.start(subject.keys(folder))
    batch, *_ = _batch(plan, objective, [0, 1, 2])
    objective.train()
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(plan.model.module).items()}
    parts = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    modes = {name: module.training for name, module in plan.model.module.named_modules()}
    first = _numbers(objective, [batch])
    after = named_tensors(plan.model.module)
    if moved := [name for name, tensor in before.items() if not same_bytes(after[name], tensor)]:
        raise Broken(f"{names(moved)} changed", "A stage only computes")
    if moved := [name for name, value in parts.items() if not torch.equal(value, vars(batch)[name])]:
        raise Broken(f"the batch's {names(moved)} changed", "Work on copies")
    if modes != {name: module.training for name, module in plan.model.module.named_modules()}:
        raise Broken("modules were switched between training and evaluation", "Switch them back")
    if _numbers(objective, [batch]) != first:
        raise Broken("the same batch has another loss the second time", "Keep no state between batches")


def does_not_depend_on_micro_batches(subject: Subject, folder: Path) -> None:
    """Eight rows a step train alike as one micro-batch or as four."""
    runs = []
    for rows, micros in ((8, 1), (2, 4)):
        keys = subject.keys(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=micros)
        runs.append(running.train({**keys, "output_dir": str(folder / f"run-{micros}")}))
    fix = "Return a sum, and nothing that depends on the other rows of a micro-batch"
    edits.compare_runs(runs[0], runs[1], "1 micro-batch", "4 micro-batches", subject.tolerance, fix)


def learns(subject: Subject, folder: Path) -> None:
    """Eight steps on the same rows lower the loss; or move the weights, where a stage learns from changing answers."""
    keys = subject.keys(folder, max_steps=8, per_device_train_batch_size=12, disable_shuffling=True)
    found = running.train(keys)
    losses = [row["loss"] for row in found.metrics]
    if isinstance(subject.built(), RollsOut):
        if not any(row["grad_norm"] for row in found.metrics):
            raise Broken("no step had a gradient", "Learn from the answers that are better than others")
    elif not losses[-1] < losses[0]:
        raise Broken(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}", "Check the sign of the loss")


def _batch(plan: Plan, objective: Any, rows: list[int], flat: bool = False) -> Sequence[Batch]:
    """What the stage makes of one micro-batch of rows: one, unless it prepares several of it."""
    return _batches(plan, objective, [rows], flat)


def _batches(plan: Plan, objective: Any, parts: list[list[int]], flat: bool = False) -> Sequence[Batch]:
    """The micro-batches of a step, as the stage prepares them, in the mode that the objective is in."""
    batches: Any = plan.data.batches
    batches, rows = replace(batches, flat=flat or batches.flat), [row for part in parts for row in part]
    others = other_answers(batches.samples, rows)
    return list(prepared(objective, [to_device(batches.batch(part, others), plan.device) for part in parts]))


def _padded_more(batch: Batch, extra: int) -> Batch:
    """A padded batch with `extra` more columns of padding."""
    if batch.attention_mask is None:
        return batch
    rows, width = batch.input_ids.shape
    spots = batch.predict_at // width * (width + extra) + batch.predict_at % width

    def wider(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((rows, extra), value)], dim=1)

    return replace(
        batch, input_ids=wider(batch.input_ids, 0), labels=wider(batch.labels, -100),
        attention_mask=wider(batch.attention_mask, 0), predict_at=spots,
    )  # fmt: skip


def _numbers(objective: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Sums over the batches of loss and metrics."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in objective(batch).sums().items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums


def _moved(objective: Any, batches: Sequence[Batch], trained: list[Any], along: list[Tensor], step: float) -> float:
    """The loss after a step along a direction, which is taken back."""
    kept = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter, direction in zip(trained, along, strict=True):
            parameter.add_(direction, alpha=step)
        found = sum(objective(batch).total.item() for batch in batches)
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return found
