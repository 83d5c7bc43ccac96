"""A run's folder: what it records, who may write to it, and what is deleted where a run starts over. The names of its
files are in `file_names.py`."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError
from llmtune.data.plot import plotting_problem
from llmtune.folders import write_durably
from llmtune.planning.decisions import decided
from llmtune.recipe.secrets import hidden
from llmtune.recipe.text import leaves, show
from llmtune.training.file_names import (
    BENCHMARKS,
    LOCK,
    LOGGERS,
    METRICS,
    PREDICT_RESULTS,
    PREDICT_SETTINGS,
    PREDICTIONS,
    QUARANTINE,
    RECORD,
    RESOLVED,
    TRAINED,
)
from llmtune.training.lock import PROBE, launcher
from llmtune.training.step_folders import delete_all, published

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe

_FILES = (
    "recipe.yaml", RESOLVED, "chat_template.jinja", METRICS, "loss.png", TRAINED, QUARANTINE,
    PREDICTIONS, PREDICT_SETTINGS, PREDICT_RESULTS,
)  # fmt: skip
_OUTPUTS = {"output_dir", "export_dir", "tokenized_path", "cache_dir", "resume_from_checkpoint", "logger_config"}
"""Keys that may name a place inside of `output_dir`: nothing there is read to train on."""


def check_folder(recipe: Recipe, launchers: Set[str] | None = None) -> None:
    """Raise PlanError unless a run may start, or go on, in the output folder. Changes nothing, reads no checkpoint.

    Before `launchers` are known, a rank of an elastic launcher counts as one that was started again.
    """
    if sentence := foreign(recipe) or occupied(recipe, launchers):
        raise PlanError(sentence)


def foreign(recipe: Recipe) -> str | None:
    """What is in the place of the output folder and no run's: a file, or a folder with other things; or what the run
    would read from inside of it."""
    folder = output_dir(recipe)
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file; name a folder"
    for key, value in _inputs_inside(recipe, folder):
        return (
            f"{key}: {value} lies in output_dir {folder}, where this run writes and may delete; copy it elsewhere, or "
            "name another output_dir"
        )
    if _is_empty(folder) or is_run(folder):
        return None
    return f"output_dir: {folder} is not empty and holds no run of llmtune; name another folder"


def occupied(recipe: Recipe, launchers: Set[str] | None = None) -> str | None:
    """Why the run that is in the output folder is neither replaced nor continued."""
    train, folder = recipe.train, output_dir(recipe)
    if _is_empty(folder) or recipe.fresh:
        return None
    if is_finished(folder):
        if train.overwrite_output_dir:
            return None
        return (
            f"output_dir: {folder} holds a finished run; name another folder, "
            "or set overwrite_output_dir=true to replace it"
        )
    again = launcher() is not None if launchers is None else started_again(folder, launchers)
    if not train.resume_from_checkpoint and not again and published(folder / "checkpoints"):
        return (
            f"output_dir: {folder} holds an unfinished run; set resume_from_checkpoint=auto to continue it, or start "
            "over with --fresh"
        )
    return None


def output_dir(recipe: Recipe) -> Path:
    """The folder of the recipe's run."""
    assert recipe.train.output_dir is not None  # filled in when the recipe was read
    return Path(recipe.train.output_dir)


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there but what a start that was killed at once leaves behind."""
    left = {LOCK, f"{RECORD}.partial"}
    return not folder.is_dir() or all(path.name in left or path.name.startswith(PROBE) for path in folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end."""
    return read_record(folder).get("status") == "done"


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run of llmtune, and not just any `run.json`."""
    path = folder / RECORD
    if not path.is_file():
        return False
    if not path.stat().st_size:  # a power cut has emptied it
        return (folder / RESOLVED).exists()
    found = read_record(folder).get("packages")
    return isinstance(found, dict) and "llmtune" in found


def started_again(folder: Path, launchers: Set[str]) -> bool:
    """Whether one of these elastic launchers has started the run that is in `folder`."""
    return not launchers.isdisjoint(read_record(folder).get("launchers") or ())


def _inputs_inside(recipe: Recipe, folder: Path) -> Iterator[tuple[str, str]]:
    """(key, value) of what the recipe reads from inside of `folder`: the model, adapters, data, plugins' own files."""
    home = folder.resolve()
    given = {**recipe.resolved, "model": recipe.model.model}
    for at, value in leaves({key: value for key, value in given.items() if key not in _OUTPUTS}):
        for name in value.split(",") if isinstance(value, str) else ():
            path = Path(name.strip()).expanduser()
            if len(name) < 4096 and home in path.resolve().parents and path.exists():
                yield show(at), name.strip()


def clear(folder: Path) -> None:
    """Delete what a run of llmtune left in `folder`, and nothing else. The folder stays known as a run's."""
    result = read_record(folder).get("result")
    delete_all(folder / "checkpoints")
    for name in (LOGGERS, ".model.partial", ".model.former"):
        _delete_tree(folder / name)
    model = folder / "model"
    if result is None:  # the run did not come to its end, or an older llmtune kept no list
        _delete_tree(model)
    for name in result or ():
        if (path := Path(name)).parts[0] == "model" and ".." not in path.parts:
            (folder / path).unlink(missing_ok=True)
    for measured in (folder / BENCHMARKS).glob("*.json"):
        measured.unlink()
    for name in (*_FILES, f".{TRAINED}.partial"):
        (folder / name).unlink(missing_ok=True)
    for place in (*sorted(model.rglob("*"), reverse=True), model, folder / BENCHMARKS):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    # Last, and not deleted: after a kill before here the same command clears again, after one later it just starts.
    write_durably(folder / RECORD, json.dumps({"status": "running", "packages": packages()}))


def _delete_tree(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def output_problems(recipe: Recipe) -> Iterator[str]:
    """What would keep any run from writing its results, found before hours are spent on it."""
    if recipe.train.plot_loss and (reason := plotting_problem()):
        yield f"plot_loss: {reason}"
    if sentence := foreign(recipe):
        yield sentence
    folder = output_dir(recipe)
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
    folder, files = plan.output_dir, plan.model.files
    folder.mkdir(parents=True, exist_ok=True)
    # First: a folder that has it is known as a run's, whatever a kill keeps from being written.
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "steps": plan.steps,
        "model_origin": files.origin, "model_revision": files.revision, "decided": decided(plan),
    }  # fmt: skip
    write_status(folder, "running", **versions(plan), **more, **facts)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_durably(folder / "recipe.yaml", plan.recipe.text)
    write_durably(folder / RESOLVED, plan.recipe.to_yaml())
    if isinstance(plan.model.tokenizer.chat_template, str):
        write_durably(folder / "chat_template.jinja", plan.model.tokenizer.chat_template)
    if plan.data.prepared.stream is None:  # a stream adds its rows as it meets them
        write_quarantine(folder, plan.data.prepared.report.bad_rows)


def write_quarantine(folder: Path, bad_rows: Sequence[Path]) -> None:
    """The rows that `on_bad_record: skip` leaves out, as the data's stores list them; no file where there are none."""
    path = folder / QUARANTINE
    path.unlink(missing_ok=True)
    for source in bad_rows:
        with source.open("rb") as lines, path.open("ab") as file:
            shutil.copyfileobj(lines, file)


def write_status(folder: Path, status: str, **more: Any) -> None:
    """Update run.json in one step, so that no reader sees half of it, nor finds it empty after a power cut."""
    record = {key: value for key, value in read_record(folder).items() if key != "error"}
    record |= {"status": status, "updated": datetime.now(UTC).isoformat(timespec="seconds"), **more}
    write_durably(folder / RECORD, json.dumps(record, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """run.json, or an empty record where there is none or a power cut has emptied it."""
    path = folder / RECORD
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text) if text.strip("\0 \n") else {}
        if not isinstance(record, dict):
            raise ValueError("not a mapping")
        return record
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise PlanError(f"{path}: is no record of llmtune ({error}); name another output_dir") from error


def versions(plan: Plan) -> Mapping[str, Any]:
    """Everything one would ask when a result cannot be repeated."""
    return {
        "packages": packages(),
        "plugins": plan.parts.fingerprint(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(plan.device),
        "ranks": plan.ranks.size,
        "command": [Path(sys.argv[0]).name, *(hidden(word) for word in sys.argv[1:])],
    }


def packages() -> dict[str, str]:
    """Versions of the packages that a result may depend on, as far as they are installed."""
    found = {}
    for name in ("llmtune", "torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
