"""Laws of evaluators: what they report is named, finite, and the same however rows are laid, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtune.contract.evaluation import MeasuresAnswers, MeasuresBatches, Prediction
from llmtune.contract.generation import GenerateConfig
from llmtune.contract.schema import field_types
from llmtune.data.batch_loader import other_answers
from llmtune.data.batches import to_device
from llmtune.model.edits import named_tensors
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points.edits import same_bytes
from llmtune.testing.ranks import in_ranks
from llmtune.training.log import read_metrics

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

TEXTS = (
    "",
    "Yes.",
    "It is 4, or four.",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
    "\U0001f600",
    "a\n\n b",
    "word " * 300,
)
"""Answers as models give them: none, in Chinese, an emoji, without end."""


def laws(subject: Subject) -> list[Check]:
    """All; the one on several ranks where they can be started."""
    found = [
        reports_what_it_names, sums_over_rows, does_not_see_the_layout, leaves_all_as_it_was,
        depends_on_the_answers_alone, takes_any_text,
    ]  # fmt: skip
    return found + ([measures_alike_on_ranks] if subject.spreads else [])


def reports_what_it_names(subject: Subject, folder: Path) -> None:
    """An evaluation reports metrics of it, all of them finite and among those that `metrics` names."""
    known = set(subject.built().metrics)
    if strange := set(getattr(subject.built(), "generation", {})) - set(field_types(GenerateConfig)):
        raise Broken(f"`generation` has {names([*strange])}", "Give keys of `GenerateConfig` alone")
    found = _evaluated(_keys(subject, folder))
    if not found:
        raise Broken("an evaluation reports nothing of it", "Return what it measures by name")
    if strange := set(found) - known:
        raise Broken(f"an evaluation reports {names([*strange])}, which `metrics` does not name", "Name every metric")
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        raise Broken(f"{names(odd)} is not finite", "Leave out what cannot be said")


def sums_over_rows(subject: Subject, folder: Path) -> None:
    """Sums and counts of a batch are those of its rows together: they are added up over batches and ranks."""
    if not isinstance(subject.built(), MeasuresBatches):
        return
    plan, objective = _start(subject, folder)
    rows = [0, 1, 2, 5, 8]
    together = _numbers(subject, objective, _batch(plan, rows))
    alone = [_numbers(subject, objective, _batch(plan, [row])) for row in rows]
    for name, pair in together.items():
        total = tuple(sum(each[name][at] for each in alone) for at in (0, 1))
        if not _close(pair, total, subject.tolerance):
            raise Broken(
                f"{name} of {len(rows)} rows is {_said(pair)}, their sum one by one {_said(total)}",
                "Give the sum over all targets or rows of the batch, and how many these are",
            )


def does_not_see_the_layout(subject: Subject, folder: Path) -> None:
    """Rows laid end to end have the figures of padded ones."""
    if not isinstance(subject.built(), MeasuresBatches):
        return
    plan, objective = _start(subject, folder)
    padded, flat = (_numbers(subject, objective, _batch(plan, [0, 1, 2, 5], layout)) for layout in (False, True))
    for name, pair in flat.items():
        if not _close(pair, padded[name], 10 * subject.tolerance):
            raise Broken(
                f"{name} is {_said(pair)} end to end and {_said(padded[name])} padded",
                "Count what `predict_at` and `targets` name, or labels that are not -100",
            )


def leaves_all_as_it_was(subject: Subject, folder: Path) -> None:
    """Measuring a batch leaves weights, the batch, modes and torch's random state alone, and repeats itself."""
    if not isinstance(subject.built(), MeasuresBatches):
        return
    plan, objective = _start(subject, folder)
    batch = _batch(plan, [0, 1, 2])
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(plan.model.module).items()}
    parts = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    modes, state = [module.training for module in plan.model.module.modules()], torch.get_rng_state()
    first = _numbers(subject, objective, batch)
    after = named_tensors(plan.model.module)
    if moved := [name for name, tensor in before.items() if not same_bytes(after[name], tensor)]:
        raise Broken(f"{names(moved)} changed", "An evaluator only looks")
    if moved := [name for name, value in parts.items() if not torch.equal(value, vars(batch)[name])]:
        raise Broken(f"the batch's {names(moved)} changed", "Work on copies")
    if modes != [module.training for module in plan.model.module.modules()]:
        raise Broken("modules were switched between training and evaluation", "Leave them in evaluation")
    if not torch.equal(state, torch.get_rng_state()) or _numbers(subject, objective, batch) != first:
        raise Broken("the same batch need not have the same figures again", "Draw no numbers and keep no state")


def depends_on_the_answers_alone(subject: Subject, folder: Path) -> None:
    """The same answers have the same figures again, after others and from another instance."""
    evaluator = subject.built()
    if not isinstance(evaluator, MeasuresAnswers):
        return
    answers = _predictions(TEXTS, TEXTS[::-1])
    first = dict(evaluator.measure_answers(answers))
    evaluator.measure_answers(_predictions(TEXTS[:2], TEXTS[:2]))
    again, other = dict(evaluator.measure_answers(answers)), dict(subject.built().measure_answers(answers))
    if first != again or first != other:
        raise Broken(f"the same answers are {first} and then {again}", "Keep no state between evaluations")


def takes_any_text(subject: Subject, folder: Path) -> None:
    """Empty answers, Chinese, emoji, no end, and no rows at all are measured in finite numbers, or not reported."""
    evaluator = subject.built()
    if not isinstance(evaluator, MeasuresAnswers):
        return
    cases = {f"{one[:12]!r} for {other[:12]!r}": ([one], [other]) for one in TEXTS for other in TEXTS}
    for what, (said, labels) in {**cases, "all of them": (TEXTS, TEXTS), "no rows": ((), ())}.items():
        found = evaluator.measure_answers(_predictions(said, labels))
        if odd := [name for name, value in found.items() if not math.isfinite(value)]:
            raise Broken(f"of {what} {names(odd)} is not finite", "Leave out what cannot be said")
        if strange := set(found) - set(subject.built().metrics):
            raise Broken(
                f"of {what} it reports {names([*strange])}, which `metrics` does not name", "Name every metric"
            )


def measures_alike_on_ranks(subject: Subject, folder: Path) -> None:
    """Three rows on two ranks, of which one runs out of rows, have the figures of one rank."""
    keys = _keys(subject, folder, val_size=3)
    (alone,) = in_ranks(1, folder / "one", _evaluated, {**keys, "output_dir": str(folder / "run-1")})
    keys |= {"gradient_accumulation_steps": 1, "output_dir": str(folder / "run-2")}
    for found in in_ranks(2, folder / "two", _evaluated, keys):
        for name in {**alone, **found}:
            one, two = alone.get(name, math.nan), found.get(name, math.nan)
            if not math.isclose(one, two, rel_tol=subject.tolerance, abs_tol=1e-6):
                raise Broken(
                    f"{name} is {one} on 1 rank and {two} on 2",
                    "Give sums and counts of this rank's rows, and the same names for a batch without targets",
                )


def _keys(subject: Subject, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run that learns next to nothing and is evaluated once."""
    return subject.keys(
        folder,
        **{
            "max_steps": 1, "learning_rate": 1e-12, "val_size": 4, "eval_strategy": "steps", "eval_steps": 1,
            "max_new_tokens": 4, "do_sample": False, **changes,
        },
    )  # fmt: skip


def _evaluated(keys: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation reports besides the loss."""
    running.train(keys)
    (row,) = (row for row in read_metrics(keys["output_dir"]) if "eval_loss" in row)
    return {name.removeprefix("eval_"): row[name] for name in row if name.startswith("eval_") and name != "eval_loss"}


def _start(subject: Subject, folder: Path) -> tuple[Plan, Any]:
    plan, objective = running.start(subject.keys(folder))
    objective.eval()
    return plan, objective


def _batch(plan: Plan, rows: list[int], flat: bool = False) -> Any:
    batches: Any = replace(plan.data.batches, flat=flat)  # type: ignore[type-var]
    return to_device(batches.batch(rows, other_answers(batches.samples, rows)), plan.device)


def _numbers(subject: Subject, objective: Any, batch: Any) -> dict[str, tuple[float, ...]]:
    evaluator: Any = subject.built()
    with torch.no_grad():
        found = objective(lambda: evaluator.measure_batch(objective.model, batch, objective.context))
    return {name: tuple(float(value) for value in pair) for name, pair in found.items()}


def _close(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    return all(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6) for a, b in zip(one, other, strict=True))


def _said(pair: Sequence[float]) -> str:
    return f"{pair[0]:.6g} of {pair[1]:.6g}"


def _predictions(said: Sequence[str], labels: Sequence[str]) -> list[Prediction]:
    return [
        Prediction(row=f"rows.jsonl:{at}", prompt="?", predict=one.strip(), label=other.strip(), cut=False)
        for at, (one, other) in enumerate(zip(said, labels, strict=True), 1)
    ]
