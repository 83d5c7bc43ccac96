"""A run's folder, read in whatever state it is: finished, being written, killed, damaged."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtune.contract.errors import CheckpointError, LlmtuneError
from llmtune.recipe.text import parse
from llmtune.training.file_names import BENCHMARKS, LOCK, PREDICT_RESULTS, RECORD, RESOLVED
from llmtune.training.log import parse_metrics


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run hold, as far as they can be read. `problems` says in sentences which cannot."""

    folder: Path
    record: Mapping[str, Any]
    """run.json."""
    settings: Mapping[str, Any]
    """resolved.yaml."""
    metrics: list[dict[str, Any]]
    """metrics.jsonl, the numbers of each line, oldest first."""
    results: Mapping[str, float]
    """What was measured after training: `predict_results.json`, and benchmarks as `TASK METRIC`, those of a
    checkpoint as `TASK METRIC of CHECKPOINT`."""
    problems: list[str] = field(default_factory=list)

    @cached_property
    def status(self) -> str:
        """`done`, `interrupted`, `running`, `failed`; `killed` where its process is gone without a word, `damaged`
        where run.json cannot be read."""
        status = str(self.record.get("status") or "damaged")
        return "killed" if status == "running" and _is_gone(self.folder / LOCK) else status

    def values(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every line that has this metric."""
        return [(row["step"], row[metric]) for row in self.metrics if metric in row]


def read_run(folder: str | Path) -> RunFiles:
    """Read a run's folder. Raises CheckpointError where it holds no run of llmtune."""
    folder = Path(folder)
    if not holds_run(folder):
        raise CheckpointError(f"{folder}: holds no run of llmtune (no {RECORD} of one); name a folder that a run wrote")
    problems: list[str] = []
    rows, lines = parse_metrics(folder)
    metrics = [{name: value for name, value in row.items() if is_number(value)} for row in rows]
    return RunFiles(
        folder, _mapping(folder / RECORD, problems), _mapping(folder / RESOLVED, problems),
        [row for row in metrics if "step" in row], _results(folder, problems), problems + lines,
    )  # fmt: skip


def holds_run(folder: Path) -> bool:
    """Whether a run of llmtune wrote this folder: its run.json says so, or is damaged and has a run's files beside."""
    if not (folder / RECORD).is_file():
        return False
    record = _mapping(folder / RECORD, [])
    packages = record.get("packages")
    return "llmtune" in packages if isinstance(packages, dict) else not record and (folder / RESOLVED).is_file()


def find_runs(places: Iterable[str | Path]) -> Iterator[Path]:
    """The folders of runs that are, or lie below, `places`, each once. Nothing inside of a run is looked at, nor what
    is hidden or behind a symbolic link."""
    seen: set[Path] = set()
    for place in places:
        for where, folders, _ in os.walk(place):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            folder = Path(where)
            if holds_run(folder):
                folders.clear()
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield folder


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; an empty one, and a problem, where it does not."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else parse(text, str(path)).tree
        if isinstance(found, dict):
            return found
        problems.append(f"{path}: holds no mapping")
    except FileNotFoundError:
        problems.append(f"{path}: is not there")
    except (OSError, ValueError, LlmtuneError) as error:
        problems.append(f"{path}: cannot be read ({error})")
    return {}


def _results(folder: Path, problems: list[str]) -> dict[str, float]:
    found = _mapping(folder / PREDICT_RESULTS, problems) if (folder / PREDICT_RESULTS).exists() else {}
    for path in sorted((folder / BENCHMARKS).rglob("*.json")):
        of = "" if path.parent.name == BENCHMARKS else f" of {path.parent.name}"
        content = _mapping(path, problems)
        task, metrics = content.get("task", path.stem), content.get("metrics")
        if isinstance(metrics, dict):
            found |= {f"{task} {name}{of}": value for name, value in metrics.items()}
    return {name: value for name, value in found.items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a value from a file can be reckoned with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_gone(lock: Path) -> bool:
    """Whether the lock's process ran on this machine and is no more. On another machine nobody can tell."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(lock.read_text(encoding="utf-8"))
        if holder["host"] == socket.gethostname():
            try:
                os.kill(int(holder["pid"]), 0)  # signal 0 only asks
            except ProcessLookupError:
                return True
    return False
