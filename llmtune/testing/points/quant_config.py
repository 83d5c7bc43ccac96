"""Laws of quantisers: rules that convert and restore, whole or in pieces, and layers that compute what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtune.contract.errors import PlanError
from llmtune.contract.load_rules import LoadRule
from llmtune.model.edits import named_tensors
from llmtune.testing import running
from llmtune.testing.contract import Broken, Check, Subject, names
from llmtune.testing.points import edits
from llmtune.testing.points.edits import change_of, distance, mode_of, same_bytes
from llmtune.testing.points.pieces import convert_in_pieces
from llmtune.testing.ranks import in_ranks

if TYPE_CHECKING:
    from llmtune.planning.model_plan import ModelPlan


def laws(subject: Subject) -> list[Check]:
    """Those that train are left out for a quantiser that is for inference only."""
    always = [
        edits.accounts_for_every_tensor, edits.loads_completely, says_that_it_quantises, converts_as_declared,
        restores_what_it_converted, converts_in_pieces, computes_with_the_restored_weights,
    ]  # fmt: skip
    if subject.mode == "infer":
        return [*always, refuses_training]
    alone = [trains_as_on_the_restored_weights, edits.saves_a_plain_model]
    return [*always, *alone] + ([loads_the_same_on_ranks, edits.same_on_ranks] if subject.spreads else [])


def says_that_it_quantises(subject: Subject, folder: Path) -> None:
    """It gives the word `quantized_base`, by which others know that base weights cannot train."""
    if "quantized_base" not in running.registry().find(subject.point, subject.name).plugin.gives:
        raise Broken("its `gives` lacks quantized_base", 'Write Plugin(gives=frozenset({"quantized_base"}))')


def refuses_training(subject: Subject, folder: Path) -> None:
    """A quantiser for inference only says so before a run starts."""
    try:
        running.plan(subject.keys(folder))
    except PlanError:
        return
    raise Broken(
        "a recipe that trains on it is accepted",
        'Object in `check` where `context.mode` is "train", or drop mode="infer"',
    )


def converts_as_declared(subject: Subject, folder: Path) -> None:
    """`convert` returns exactly the rule's targets, in shape and type of the model's tensors, the same every time, and
    leaves the source alone.
    """
    plan, sources = _plan_and_sources(subject, folder)
    there = named_tensors(plan.module)
    for rule in _rules(subject, plan):
        source = sources[rule.source]
        before = source.clone()
        first, second = dict(rule.convert(source)), dict(rule.convert(source))
        if not torch.equal(before, source):
            raise Broken(f"`convert` changed its source {rule.source}", "Work on a copy")
        if set(first) != set(rule.targets):
            odd = names(list(set(first) ^ set(rule.targets)))
            raise Broken(f"`convert` and `targets` of {rule.source} disagree about {odd}", "Return each target once")
        for name, value in first.items():
            wanted = there[name]
            if value.shape != wanted.shape or value.dtype != wanted.dtype:
                raise Broken(
                    f"`convert` gives {name} as {_form(value)}, the layer holds {_form(wanted)}",
                    "Make the layer's empty tensor what `convert` returns",
                )
            if not same_bytes(value, second[name]):
                raise Broken(f"`convert` gives two values for {name} from one source", "Leave out what is random")


def restores_what_it_converted(subject: Subject, folder: Path) -> None:
    """`restore` undoes `convert` up to the format's error (root of the mean square), which `error` bounds."""
    plan, sources = _plan_and_sources(subject, folder)
    for rule in _rules(subject, plan):
        source = sources[rule.source].float()
        back = rule.restore(rule.convert(sources[rule.source])).float()
        if back.shape != source.shape:
            raise Broken(f"{rule.source} {list(source.shape)} is restored as {list(back.shape)}", "Keep the shape")
        far = ((back - source).square().mean().sqrt() / source.square().mean().sqrt()).item()
        if not far <= subject.error:
            raise Broken(
                f"{rule.source} is restored with an error of {far:.3f} of its size, allowed is {subject.error}",
                "Mend `convert` or `restore`, or give the test the error of the format: laws(..., error=...)",
            )


def converts_in_pieces(subject: Subject, folder: Path) -> None:
    """`convert_part` on 1, 2, 3 and 5 ranks gives the rows that `convert` gives for the whole, to the byte; or None."""
    plan, sources = _plan_and_sources(subject, folder)
    there = named_tensors(plan.module)
    parameters = set(dict(plan.module.named_parameters()))
    for rule in _one_of_each(subject, plan):
        whole = rule.convert(sources[rule.source])
        for ranks in (1, 2, 3, 5):
            pieces = convert_in_pieces(rule, sources[rule.source], there, parameters, ranks)
            if pieces is None:
                continue
            for name in rule.targets:
                if name in parameters:
                    joined = [torch.cat([piece[name] for piece in pieces])]
                else:
                    joined = [piece[name] for piece in pieces]
                if not all(same_bytes(value.reshape(whole[name].shape), whole[name]) for value in joined):
                    raise Broken(
                        f"{name} made in pieces on {ranks} ranks is not what `convert` makes",
                        "Begin each piece where a block of the format begins, and gather what blocks share",
                    )


def computes_with_the_restored_weights(subject: Subject, folder: Path) -> None:
    """The quantised model's logits are those of the plain model with the weights that `restore` gives."""
    plan, _ = running.build(subject.keys(folder), mode_of(subject))
    plain, _ = running.build(subject.plain_keys(folder), mode_of(subject))
    _restore_into(plain, plan)
    far = distance(edits.logits(plan.module, edits.probe(plan)), edits.logits(plain.module, edits.probe(plan)))
    if far > subject.tolerance:
        raise Broken(
            f"its logits differ by {far:.1e} of their size from those of the restored weights",
            "Make the layer's forward use what `restore` returns, bias included, or give laws(..., tolerance=...)",
        )


def trains_as_on_the_restored_weights(subject: Subject, folder: Path) -> None:
    """Gradients of what trains beside the quantised weights are those of the plain model with the restored weights."""
    plan, objective = running.start(subject.keys(folder))
    plain, plain_objective = running.start(subject.plain_keys(folder))
    _restore_into(plain.model, plan.model)
    expected = edits.first_gradients(plain, plain_objective)
    edits.compare_gradients(
        edits.first_gradients(plan, objective), expected, subject.tolerance, "with the restored weights"
    )


def loads_the_same_on_ranks(subject: Subject, folder: Path) -> None:
    """Three ranks together hold the bytes that one holds, however rows fall on them."""
    keys = subject.keys(folder)
    one = running.whole_state(keys)
    three = in_ranks(3, folder / "ranks", running.whole_state, {**keys, "per_device_train_batch_size": 1})[0]
    if odd := [name for name in one if not same_bytes(three[name], one[name])]:
        raise Broken(f"{names(odd)} have other bytes on 3 ranks", "Compare `convert_part` with `convert`")


def _plan_and_sources(subject: Subject, folder: Path) -> tuple[ModelPlan, dict[str, Tensor]]:
    """The edited structure, and the original weights by the names that rules give them."""
    plan = running.plan_model(subject.keys(folder), mode_of(subject))
    original, _ = running.build(subject.plain_keys(folder), mode_of(subject))
    sources = {name: tensor.detach() for name, tensor in named_tensors(original.module).items()}
    if not _rules(subject, plan):
        raise Broken("it reports no load rules, so nothing was quantised", "Choose a `family` that it quantises")
    return plan, sources


def _rules(subject: Subject, plan: ModelPlan) -> list[LoadRule]:
    return list(change_of(subject, plan).rules)


def _one_of_each(subject: Subject, plan: ModelPlan) -> list[LoadRule]:
    """One rule of each source shape: layers repeat."""
    return list({plan.ledger.shapes[rule.source]: rule for rule in _rules(subject, plan)}.values())


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _restore_into(plain: ModelPlan, plan: ModelPlan) -> None:
    """Replace the weights of the plain model by what `restore` makes of the quantised ones that were loaded."""
    tensors, theirs = named_tensors(plan.module), named_tensors(plain.module)
    with torch.no_grad():
        for name, placed in plan.ledger.rules.items():
            parts = {target: tensors[now].detach() for target, now in placed.where.items()}
            theirs[name].copy_(placed.rule.restore(parts))
