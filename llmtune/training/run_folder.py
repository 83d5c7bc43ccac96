"""A run's folder: what it records, and whether a new process starts over, continues, or must not touch it.

recipe.yaml     as given            resolved.yaml   with defaults and overrides
run.json        versions, plugins, status             metrics.jsonl   one line per logged step
model/          what others read    trained.safetensors  the trained tensors of an adapter, by model name
checkpoints/    see llmtune.training.checkpoint        quarantine.jsonl  rows that cannot be used, and why
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import CheckpointError, PlanError, listed, raise_all
from llmtune.contract.extension_points import POINTS
from llmtune.recipe.secrets import hidden
from llmtune.training.lock import LOCK, launcher
from llmtune.training.plot import plotting_problem

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe
    from llmtune.training.checkpoint import Manifest

# Keys that may differ between a run and its continuation: they change what is reported or kept, not what is learnt.
COSMETIC = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit",
    "eval_strategy", "eval_steps", "per_device_eval_batch_size", "eval_dataset", "eval_on_each_dataset", "plot_loss",
    "early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "sample_prompts", "token", "cache_dir", "export_dir", "export_size", "export_hub_model_id",
    "export_legacy_format", "infer_dtype", "disable_gradient_checkpointing", "activation_checkpointing",
    "use_reentrant_gc", "torch_compile", "ddp_timeout", "preprocessing_num_workers",
    "preprocessing_batch_size", "overwrite_cache", "tokenized_path", "data_shared_file_system",
    *(name for name, point in POINTS.items() if not point.changes_training),
}  # fmt: skip
SPLIT = {"per_device_train_batch_size", "gradient_accumulation_steps"}
"""May differ as long as a step has the same rows; left as they were, they are fitted to the number of ranks."""

QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    found: tuple[Path, Manifest] | None
    """The checkpoint to continue from."""
    rows: int | None
    """Rows of an optimiser step, where an earlier start of the run has set them."""
    notes: tuple[str, ...] = ()
    """What whoever starts the run should know."""


def prepare_folder(plan: Plan, launchers: Set[str] = frozenset()) -> Start:
    """Make the output folder ready and record the run (rank 0).

    `launchers` are the elastic launchers of all ranks. If one of them is on record, this is its run started again, and
    goes on whatever `overwrite_output_dir` and `resume_from_checkpoint` say: those were meant for the first start.
    Raises PlanError where the folder belongs to something else or to a finished run, CheckpointError where a
    checkpoint is damaged or comes from another recipe.
    """
    from llmtune.training import checkpoint

    check_folder(plan.recipe, launchers)
    again = _started_again(plan.output_dir, launchers)
    if plan.recipe.train.overwrite_output_dir and not again:
        clear(plan.output_dir)
    found, notes = checkpoint_to_continue(plan, again)
    if found is not None:
        compare(plan, found[1])
    checkpoint.sweep(plan.output_dir / "checkpoints")
    rows = found[1].rows if found else read_record(plan.output_dir).get("rows") if again else None
    write_records(plan, launchers=sorted(launchers), rows=rows or plan.data.batches.order.batch)
    return Start(found, rows, notes)


def _started_again(folder: Path, launchers: Set[str]) -> bool:
    return not launchers.isdisjoint(read_record(folder).get("launchers") or ())


def check_folder(recipe: Recipe, launchers: Set[str] | None = None) -> None:
    """Raise PlanError unless a run may start, or go on, in the output folder. Changes nothing, reads no checkpoint.

    Before `launchers` are known, a rank of an elastic launcher counts as one that was started again.
    """
    if sentence := foreign(recipe) or occupied(recipe, launchers):
        raise PlanError(sentence)


def foreign(recipe: Recipe) -> str | None:
    """What is in the place of the output folder and no run's: a file, or a folder with other things."""
    train, folder = recipe.train, Path(recipe.train.output_dir or "")
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file; name a folder"
    if _is_empty(folder) or (folder / "run.json").exists():
        return None
    what = "overwrite_output_dir" if train.overwrite_output_dir else "output_dir"
    return f"{what}: {folder} is not empty and holds no run of llmtune; name another folder"


def occupied(recipe: Recipe, launchers: Set[str] | None = None) -> str | None:
    """Why the run that is in the output folder is neither replaced nor continued."""
    train, folder = recipe.train, Path(recipe.train.output_dir or "")
    if _is_empty(folder) or train.overwrite_output_dir:
        return None
    if read_record(folder).get("status") == "done":
        return (
            f"output_dir: {folder} holds a finished run; name another folder, "
            "or set overwrite_output_dir=true to replace it"
        )
    again = launcher() is not None if launchers is None else _started_again(folder, launchers)
    if not train.resume_from_checkpoint and not again and any((folder / "checkpoints").glob("step-*")):
        return (
            f"output_dir: {folder} holds an unfinished run; set resume_from_checkpoint=auto to continue it, or "
            "overwrite_output_dir=true to replace it"
        )
    return None


def _is_empty(folder: Path) -> bool:
    return not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir())


def checkpoint_to_continue(plan: Plan, again: bool = False) -> tuple[tuple[Path, Manifest] | None, tuple[str, ...]]:
    """The verified checkpoint that `resume_from_checkpoint` means, and notes: a path, or with `auto` this folder's
    newest.

    A run that its launcher has started `again` continues from its own newest one, if it has one.
    """
    from llmtune.training import checkpoint

    resume, own = plan.recipe.train.resume_from_checkpoint, plan.output_dir / "checkpoints"
    if again and any(own.glob("step-*")):
        resume = "auto"
    if not resume:
        return None, ()
    root = own if resume == "auto" else Path(str(resume)) / "checkpoints"
    if resume == "auto" or (Path(str(resume)) / "run.json").exists():
        found = checkpoint.newest(root)
        if found is None and resume != "auto":
            raise CheckpointError(f"resume_from_checkpoint: the run {resume} has no checkpoint")
        if found is None:
            return None, ()
        return (found[0], found[1]), tuple(f"passed over a damaged checkpoint: {reason}" for reason in found[2])
    path = Path(str(resume))
    manifest = checkpoint.verify(path)
    later = [
        step.name for step in sorted(own.glob("step-*")) if step.name > checkpoint.step_folder(own, manifest.step).name
    ]
    if later:
        raise CheckpointError(
            f"resume_from_checkpoint: {own} holds later steps than {path.name} ({listed(later)}); "
            "delete them to go back, or name another output_dir"
        )
    return (path, manifest), ()


def clear(folder: Path) -> None:
    """Delete what a run of llmtune left in `folder`, and nothing else."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (
        "recipe.yaml",
        "resolved.yaml",
        "run.json",
        "metrics.jsonl",
        "loss.png",
        "trained.safetensors",
        QUARANTINE,
    ):
        (folder / name).unlink(missing_ok=True)


def compare(plan: Plan, manifest: Manifest) -> None:
    """Refuse to continue a run with a recipe that would have made another one. Names every difference."""
    old, new = dict(manifest.recipe), plain(plan.recipe.resolved)
    differing = sorted(key for key in (old.keys() | new.keys()) - COSMETIC - SPLIT if old.get(key) != new.get(key))
    check_batch(plan, manifest)
    if manifest.data and manifest.data != plan.data.digest:
        raise CheckpointError(
            "dataset: the tokens to train on are not those the run was started with (the files, the tokenizer or the "
            "template have changed); restore them, or name another output_dir"
        )
    if manifest.revision != plan.model.files.revision:
        raise CheckpointError(
            f"revision: the run was started from commit {manifest.revision}, now the model is "
            f"{plan.model.files.revision}; set revision: {manifest.revision}"
        )
    if differing:
        shown = listed(f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in differing)
        raise CheckpointError(
            f"the run in {plan.output_dir} was started with other values of {shown}; "
            "restore them, or name another output_dir"
        )


def check_batch(plan: Plan, manifest: Manifest) -> None:
    """Raise CheckpointError if the recipe's batch was changed so that a step has other rows than the run's."""
    train = plan.recipe.train
    product = train.per_device_train_batch_size * train.gradient_accumulation_steps * plan.ranks.batch_ranks
    changed = any(manifest.recipe.get(key) != getattr(train, key) for key in SPLIT)
    if changed and product != manifest.rows:
        raise CheckpointError(
            f"per_device_train_batch_size: the run was started with {manifest.rows} rows a step "
            f"({manifest.ranks} rank{'' if manifest.ranks == 1 else 's'}), "
            f"this recipe makes {product} (per_device_train_batch_size {train.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {train.gradient_accumulation_steps} x {plan.ranks.batch_ranks}); "
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
    micros = -(-rows // (train.per_device_train_batch_size * plan.ranks.batch_ranks))
    key, before, now = "gradient_accumulation_steps", train.gradient_accumulation_steps, micros
    if before == now:
        key, before = "per_device_train_batch_size", train.per_device_train_batch_size
        now = -(-rows // (micros * plan.ranks.batch_ranks))
    idle = max(0, plan.ranks.batch_ranks - rows)
    note = (
        f"{key}: {before} -> {now} on {plan.ranks.size} rank{'' if plan.ranks.size == 1 else 's'}, "
        f"so that a step still has the run's {rows} rows"
        + (f"; {idle} of the ranks have none and only hold their shard" if idle else "")
    )
    return replace(plan, data=plan.data.with_rows(rows, micros)).noted(note)


def previewed(plan: Plan) -> Plan:
    """The plan with what a run would do in its folder, for a plan that is only shown. Files are not verified.

    Raises PlanError where a run could never write its results.
    """
    from llmtune.training import checkpoint

    raise_all([PlanError(sentence) for sentence in output_problems(plan.recipe)])
    if sentence := occupied(plan.recipe):
        return plan.noted(f"a run would not start. {sentence}")
    train, steps = plan.recipe.train, sorted((plan.output_dir / "checkpoints").glob("step-*"))
    if train.overwrite_output_dir or train.resume_from_checkpoint != "auto" or not steps:
        return plan
    try:
        manifest = checkpoint.read_manifest(steps[-1])
        compare(plan, manifest)
    except CheckpointError as error:
        return plan.noted(f"the run in {plan.output_dir} cannot be continued: {error}")
    return with_rows(plan.noted(f"continues the run in {plan.output_dir} after step {manifest.step}"), manifest.rows)


def output_problems(recipe: Recipe) -> Iterator[str]:
    """What would keep any run from writing its results, found before hours are spent on it."""
    if recipe.train.plot_loss and (reason := plotting_problem()):
        yield f"plot_loss: {reason}"
    if sentence := foreign(recipe):
        yield sentence
    folder = Path(recipe.train.output_dir or "")
    existing = next((parent for parent in [folder, *folder.absolute().parents] if parent.is_dir()), None)
    if existing is not None and not _writable(existing):
        yield f"output_dir: {existing} cannot be written to; choose another folder or change its permissions"


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def plain(value: Any) -> Any:
    """`value` as JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def write_records(plan: Plan, **more: Any) -> None:
    """Recipe as given, recipe resolved, and run.json with status `running`."""
    folder = plan.output_dir
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(plan.recipe.text, encoding="utf-8")
    (folder / "resolved.yaml").write_text(plan.recipe.to_yaml(), encoding="utf-8")
    if plan.data.prepared.stream is None:  # a stream adds its rows as it meets them
        write_quarantine(folder, plan.data.prepared.report.bad_rows)
    files = plan.model.files
    write_status(folder, "running", **versions(plan), **more, model_origin=files.origin, model_revision=files.revision)


def write_quarantine(folder: Path, bad_rows: Sequence[Path]) -> None:
    """The rows that `on_bad_record: skip` leaves out, as the data's stores list them; no file where there are none."""
    path = folder / QUARANTINE
    path.unlink(missing_ok=True)
    for source in bad_rows:
        with source.open("rb") as lines, path.open("ab") as file:
            shutil.copyfileobj(lines, file)


def write_status(folder: Path, status: str, **more: Any) -> None:
    """Update run.json in one step, so that no reader sees half of it."""
    record = read_record(folder) | {"status": status, "updated": datetime.now(UTC).isoformat(timespec="seconds")} | more
    partial = folder / "run.json.partial"
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(folder / "run.json")


def read_record(folder: Path) -> dict[str, Any]:
    """run.json, or an empty record."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a mapping")
        return record
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise PlanError(f"{path}: not readable as JSON ({error}); delete it to give the folder up") from error


def versions(plan: Plan) -> Mapping[str, Any]:
    """Everything one would ask when a result cannot be repeated."""
    packages = {}
    for name in ("llmtune", "torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "plugins": plan.parts.fingerprint(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(plan.device),
        "ranks": plan.ranks.size,
        "command": [Path(sys.argv[0]).name, *(hidden(word) for word in sys.argv[1:])],
    }
