"""Laws of kernels: they replace something, and forward and backward are those of the model without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject
from llmtune.testing.points import edits
from llmtune.testing.points.edits import compare_gradients, distance, first_gradients, logits, probe
from llmtune.training.isolation import check_isolation


def laws(subject: Subject) -> list[Check]:
    """All; those on several ranks where they can be started."""
    found = [
        edits.accounts_for_every_tensor, edits.loads_completely, replaces_something, answers_as_without_it,
        trains_as_without_it, trains_frozen_bases_as_without_it, keeps_documents_apart, edits.saves_a_plain_model,
    ]  # fmt: skip
    return found + ([edits.same_on_ranks] if subject.spreads else [])


def replaces_something(subject: Subject, folder: Path) -> None:
    """On this model it replaces a module, an operation or the attention function: else the other laws say nothing."""
    plan, plain = running.plan_model(subject.keys(folder)), running.plan_model(subject.plain_keys(folder))
    change = edits.change_of(subject, plan)
    classes = [{name: type(module) for name, module in made.module.named_modules()} for made in (plan, plain)]
    own = any("forward" in vars(module) for module in plan.module.modules())
    if not (change.ops or change.attention or own or classes[0] != classes[1]):
        said = "; ".join(change.report) or "nothing"
        raise Broken(
            f"it changed nothing of a tiny {subject.family} (it reports: {said})", "Test it with a `family` it suits"
        )


def answers_as_without_it(subject: Subject, folder: Path) -> None:
    """Logits are those of the model without the kernel."""
    plan, _ = running.build(subject.keys(folder))
    plain, _ = running.build(subject.plain_keys(folder))
    if (far := distance(logits(plan.module, probe(plan)), logits(plain.module, probe(plan)))) > subject.tolerance:
        raise Broken(f"logits differ by {far:.1e} of their size", "Mend the forward pass")


def trains_as_without_it(subject: Subject, folder: Path) -> None:
    """Loss and every gradient are those of the model without the kernel, all parameters training."""
    _compare(subject, folder, {})


def trains_frozen_bases_as_without_it(subject: Subject, folder: Path) -> None:
    """The same where matrices are frozen and only norms and biases train."""
    _compare(subject, folder, {"peft_config": "reference"})


def _compare(subject: Subject, folder: Path, changes: dict[str, Any]) -> None:
    for more in ({}, {"packing": True}):
        found = first_gradients(*running.start(subject.keys(folder, **changes, **more)))
        expected = first_gradients(*running.start(subject.plain_keys(folder, **changes, **more)))
        where = "without it, on packed rows" if more else "without it"
        compare_gradients(found, expected, subject.tolerance, where)


def keeps_documents_apart(subject: Subject, folder: Path) -> None:
    """A document's hidden states do not depend on the document before it, where rows are laid end to end."""
    plan, objective = running.build(subject.keys(folder, packing=True))
    check_isolation(objective, plan.device, packing=True)
