"""Whether a new process starts over, continues the run in its output folder, or must not touch it."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import CheckpointError, PlanError, PluginError, counted, listed, raise_all
from llmtune.contract.generation import GenerationKeys
from llmtune.contract.schema import field_types
from llmtune.recipe.free_keys import FREE, SPLIT
from llmtune.training.manifest import Manifest, read_manifest, verify
from llmtune.training.origins import differences, judges
from llmtune.training.run_folder import (
    check_folder,
    clear,
    is_finished,
    is_run,
    occupied,
    output_dir,
    output_problems,
    plain,
    read_record,
    started_again,
    write_records,
)
from llmtune.training.step_folders import SoundCheckpoint, newest, published, set_aside, sweep

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    found: tuple[Path, Manifest] | None = None
    """The checkpoint to continue from."""
    rows: int | None = None
    """Rows of an optimiser step, where an earlier start of the run has set them."""
    notes: tuple[str, ...] = ()
    """What a person has to know of it, besides the plan."""


def prepare_folder(plan: Plan, launchers: Set[str] = frozenset()) -> Start:
    """Make the output folder ready and record the run (rank 0).

    `launchers` are the elastic launchers of all ranks. If one of them is on record, this is its run started again, and
    goes on whatever `--fresh` and `resume_from_checkpoint` say: those were meant for the first start.
    Raises PlanError where the folder belongs to something else or to a finished run, CheckpointError where a
    checkpoint is damaged or comes from another recipe.
    """
    check_folder(plan.recipe, launchers)
    folder = plan.output_dir
    again, record = started_again(folder, launchers), read_record(folder)
    if not again and is_replaced(plan.recipe):
        clear(folder)
        record = {}
    found = checkpoint_to_continue(plan, again)
    notes: tuple[str, ...] = ()
    if found is None and is_run(folder):
        clear(folder)  # an earlier start did not come as far as a checkpoint; what it logged is not this run's
    elif found is not None:
        compare(plan, found.manifest)
        notes = tuple(_passed_over(path, why, folder) for path, why in found.damaged)
    sweep(folder / "checkpoints")
    rows = found.manifest.rows if found else record.get("rows") if again else None
    write_records(
        plan, launchers=sorted(launchers), rows=rows or plan.data.batches.order.batch,
        resumed_from=_resumed_from(plan.recipe) or record.get("resumed_from"),
    )  # fmt: skip
    return Start((found.folder, found.manifest) if found else None, rows, notes)


def is_replaced(recipe: Recipe) -> bool:
    """Whether a run that is in the output folder goes: on a fresh start, and of a finished one where the recipe says
    so. An unfinished one is continued."""
    return recipe.fresh or (recipe.train.overwrite_output_dir and is_finished(output_dir(recipe)))


def _passed_over(damaged: Path, why: str, folder: Path) -> str:
    """Take a damaged checkpoint of this run out of the way of its own step, and say so."""
    own = damaged.parent.resolve() == (folder / "checkpoints").resolve()
    return f"passed over a damaged checkpoint{f', now {set_aside(damaged).name}' if own else ''}: {why}"


def decided_before(recipe: Recipe) -> dict[str, Any]:
    """The number type that was chosen when the run was started that this recipe would continue: from its record, or
    from a checkpoint that was taken out of its run. Activation checkpointing, which changes no number, is decided anew.
    """
    if is_replaced(recipe):
        return {}
    return {key: value for key, value in _recorded(recipe).items() if key != "activation_checkpointing"}


def _recorded(recipe: Recipe) -> dict[str, Any]:
    folder, place = output_dir(recipe), _resumed_from(recipe)
    path = Path(place) if place else folder
    for found in (folder, path, path.parent.parent):  # a run, or one of its checkpoints
        if is_run(found) and published(found / "checkpoints") and (before := read_record(found).get("decided")):
            return before
    for checkpoint in (path, *published(path / "checkpoints")[-1:], *published(folder / "checkpoints")[-1:]):
        with suppress(CheckpointError):  # what is wrong with it is said where it is read to go on from
            if before := read_manifest(checkpoint).numbers.get("decided"):
                return before
    return {}


def _resumed_from(recipe: Recipe) -> str | None:
    """The place outside of its own checkpoints that `resume_from_checkpoint` names."""
    resume = recipe.train.resume_from_checkpoint
    return str(Path(str(resume)).expanduser().resolve()) if resume and resume != "auto" else None


def checkpoint_to_continue(plan: Plan, again: bool = False) -> SoundCheckpoint | None:
    """The verified checkpoint that `resume_from_checkpoint` means: a path, or with `auto` this folder's newest.

    A run that its launcher has started `again`, or that was continued from that path before, continues from its own
    newest one, if it has one.
    """
    resume, own = plan.recipe.train.resume_from_checkpoint, plan.output_dir / "checkpoints"
    if place := _resumed_from(plan.recipe):
        again = again or read_record(plan.output_dir).get("resumed_from") == place
    if (again and published(own)) or resume == "auto":
        return newest(own)
    if not place:
        return None
    path = Path(place)
    if is_run(path):
        found = newest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"resume_from_checkpoint: the run {resume} has no checkpoint")
    else:
        found = SoundCheckpoint(path, verify(path))
    later = [step.name for step in published(own) if int(step.name.removeprefix("step-")) > found.manifest.step]
    if later:
        raise CheckpointError(
            f"resume_from_checkpoint: {own} holds later steps than {found.folder.name} ({listed(later)}); "
            "delete them to go back, or name another output_dir"
        )
    return found


def compare(plan: Plan, manifest: Manifest) -> None:
    """Refuse to continue a run with a recipe that would have made another one. Names every difference."""
    old, new = dict(manifest.recipe), plain(plan.recipe.resolved)
    check_batch(plan, manifest)
    restore = "restore it, or start over with --fresh or in another output_dir"
    if manifest.data and manifest.data != plan.data.digest:
        raise CheckpointError(
            "dataset: the tokens to train on are not those the run was started with (the files, what rows show, the "
            f"tokenizer or the template have changed); {restore}"
        )
    if manifest.revision != plan.model.files.revision:
        raise CheckpointError(
            f"revision: the run was started from commit {manifest.revision}, now the model is "
            f"{plan.model.files.revision}; set revision: {manifest.revision}"
        )
    if changed := differences(plan, manifest.origins):
        raise CheckpointError(
            f"{listed(changed)}: not what it was when the run in {plan.output_dir} was started; {restore}"
        )
    free = FREE | SPLIT | ({"revision"} if manifest.revision else set())  # the commit itself has been compared
    if judges(plan) and manifest.numbers.get("best_value") is not None:
        free -= {"metric_for_best_model", "greater_is_better"}
        if plan.parts.at("eval_config"):
            free -= {"eval_config", *field_types(GenerationKeys)}
    if differing := sorted(key for key in (old.keys() | new.keys()) - free if old.get(key) != new.get(key)):
        shown = listed(f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in differing)
        raise CheckpointError(
            f"the run in {plan.output_dir} was started with other values of {shown}; "
            "restore them, or start over with --fresh or in another output_dir"
        )
    check_plugins(plan, manifest)


def check_plugins(plan: Plan, manifest: Manifest) -> None:
    """Raise PluginError where a plugin that takes part in the result comes from another package or version."""
    for name, package in plan.parts.fingerprint().items():
        before = manifest.plugins.get(name)
        if name.partition(" ")[0] not in FREE and before is not None and before != package:
            raise PluginError(
                f"{name}: the run in {plan.output_dir} was started with {before}, installed is {package}; install that "
                "version again, or start over with --fresh or in another output_dir"
            )


def check_batch(plan: Plan, manifest: Manifest) -> None:
    """Raise CheckpointError if the recipe's batch was changed so that a step has other rows than the run's."""
    train, share = plan.recipe.train, plan.ranks.batch_ranks * plan.data.batches.reads
    product = train.per_device_train_batch_size * train.gradient_accumulation_steps * share
    changed = any(manifest.recipe.get(key) != plan.recipe.resolved.get(key) for key in SPLIT)
    if changed and product != manifest.rows:
        raise CheckpointError(
            f"per_device_train_batch_size: the run was started with {manifest.rows} rows a step "
            f"({counted(manifest.ranks, 'rank')}), "
            f"this recipe makes {product} (per_device_train_batch_size {train.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {train.gradient_accumulation_steps} x {share}); "
            "restore both keys, which then fit any number of ranks, or set them so that the product stays the same"
        )


def continued(plan: Plan, start: Start) -> Plan:
    """The plan as the run goes on with it: with the rows of a step that it was started with, and what to know."""
    plan = with_rows(plan, start.rows) if start.rows else plan
    return plan.noted(*start.notes)


def with_rows(plan: Plan, rows: int) -> Plan:
    """The plan with `rows` rows a step, as the run was started with, whatever the number of ranks now.

    Any number works: a step is cut into equal micro-batches, whose sizes differ by one row where it does not divide.
    """
    train = plan.recipe.train
    if plan.data.batches.order.batch == rows:
        return plan
    reads = plan.data.batches.reads
    micros = -(-rows // (train.per_device_train_batch_size * plan.ranks.batch_ranks * reads))
    key, before, now = "gradient_accumulation_steps", train.gradient_accumulation_steps, micros
    if before == now:
        key, before = "per_device_train_batch_size", train.per_device_train_batch_size
        now = -(-rows // (micros * plan.ranks.batch_ranks * reads))
    idle = max(0, plan.ranks.batch_ranks - rows)
    note = (
        f"{key}: {before} -> {now} on {counted(plan.ranks.size, 'rank')}, "
        f"so that a step still has the run's {rows} rows"
        + (f"; {idle} of the ranks have none and only hold their shard" if idle else "")
    )
    return replace(plan, data=plan.data.with_rows(rows, micros * reads)).noted(note)


def previewed(plan: Plan) -> Plan:
    """The plan with what a run would do in its folder, for a plan that is only shown. Files are not verified.

    Raises PlanError where a run could never write its results.
    """
    raise_all([PlanError(sentence) for sentence in output_problems(plan.recipe)])
    if sentence := occupied(plan.recipe):
        return plan.noted(f"a run would not start. {sentence}")
    train, steps = plan.recipe.train, published(plan.output_dir / "checkpoints")
    if is_replaced(plan.recipe) or train.resume_from_checkpoint != "auto" or not steps:
        return plan
    try:
        manifest = read_manifest(steps[-1])
        compare(plan, manifest)
    except (CheckpointError, PluginError) as error:
        return plan.noted(f"the run in {plan.output_dir} cannot be continued: {error}")
    return with_rows(plan.noted(f"continues the run in {plan.output_dir} after step {manifest.step}"), manifest.rows)
