"""Laws of how a model is spread: ranks add up, structure stays without weights, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.contract.errors import PlanError
from llmtune.contract.records import ParallelDims
from llmtune.model.edits import named_tensors, persistent_names
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points import edits
from llmtune.testing.ranks import in_ranks
from llmtune.training.building import make_objective, spread


def laws(subject: Subject) -> list[Check]:
    """Those on several ranks need as many devices."""
    found: list[Check] = [arranges_all_ranks]
    return found + ([spreads_structure_only, same_on_ranks] if subject.spreads else [])


def arranges_all_ranks(subject: Subject, folder: Path) -> None:
    """`layout(n)` has n ranks in all, the same every time, or refuses n with a PlanError; one of 1 to 8 is possible."""
    built, possible = subject.built(), []
    for ranks in range(1, 9):
        try:
            layout = built.layout(ranks)
        except PlanError:
            continue
        if not isinstance(layout, ParallelDims) or layout.ranks != ranks or built.layout(ranks) != layout:
            raise Broken(f"layout({ranks}) is {layout!r}", "Arrange all ranks, by their number alone")
        possible.append(ranks)
    if not possible:
        raise Broken("it refuses 1 to 8 ranks", "Test it with smaller groups")


def spreads_structure_only(subject: Subject, folder: Path) -> None:
    """`apply` works on the meta device: names and full shapes stay, no tensor gets storage."""
    ranks = _ranks(subject)
    for sentence in in_ranks(ranks, folder / "ranks", _spread, _keys(subject, folder, ranks)):
        if sentence:
            raise Broken(sentence, "Edit placements only; weights come later, from the core")


def _spread(keys: dict[str, Any]) -> str:
    """Run on each rank: what is wrong after spreading, or nothing."""
    plan = running.plan_model(keys)
    before = {name: tuple(tensor.shape) for name, tensor in named_tensors(plan.module).items()}
    spread(plan, make_objective(plan))
    after = named_tensors(plan.module)
    if odd := [name for name, shape in before.items() if name not in after or tuple(after[name].shape) != shape]:
        return f"{names(odd)} have another name or full shape after `apply`"
    real = [name for name in persistent_names(plan.module) if not after[name].is_meta]
    return f"{names(real)} have storage after `apply`" if real else ""


def same_on_ranks(subject: Subject, folder: Path) -> None:
    """Spread ranks train as one rank does: the same losses and gradient norms at every step, the same tensors."""
    ranks = _ranks(subject)
    one = running.train(subject.plain_keys(folder, output_dir=str(folder / "one")))
    keys = _keys(subject, folder, ranks)
    spread = in_ranks(ranks, folder / "ranks", running.train, keys)[0]
    fix = "Average gradients over the ranks with batches of their own; split only what the layout says"
    edits.compare_runs(one, spread, "1 rank", f"{ranks} ranks", subject.tolerance, fix)


def _ranks(subject: Subject) -> int:
    """The smallest number beyond one that the plugin arranges."""
    built = subject.built()
    for ranks in range(2, 9):
        try:
            built.layout(ranks)
            return ranks
        except PlanError:
            continue
    return 1


def _keys(subject: Subject, folder: Path, ranks: int) -> dict[str, Any]:
    """A recipe whose step has 8 rows, whatever shares a batch has."""
    layout = subject.built().layout(ranks)
    shares = layout.replicate * layout.shard
    micros = max(1, 2 // shares)
    return replace(subject).keys(
        folder, gradient_accumulation_steps=micros, per_device_train_batch_size=8 // (shares * micros)
    )
