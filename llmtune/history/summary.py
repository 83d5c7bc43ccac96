"""A run in a few facts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from llmtune.contract.errors import counted, listed
from llmtune.history.read import RunFiles, is_number, read_run
from llmtune.terminal import Shown
from llmtune.training.console import duration
from llmtune.training.loss_table import loss_table

GIB = 2**30


@dataclass(frozen=True)
class Best:
    """The best value of a metric, and the step it was logged at."""

    value: float
    step: int


@dataclass(frozen=True, kw_only=True)
class RunSummary(Shown):
    """What a run was and has come to. Whatever its folder does not tell is None."""

    folder: Path
    status: str
    """`done`, `interrupted`, `running`, `failed`, `killed` or `damaged`, as `RunFiles.status` says."""
    model: str | None
    stage: str | None
    method: str | None
    """The plugin of `peft_config`; `full` where every weight trains."""
    step: int
    """The last step that was logged."""
    steps: int | None
    """Steps that the run was planned to have."""
    loss: float | None
    """The last one that was logged: a mean over `logging_steps`."""
    best_loss: Best | None
    eval_loss: float | None
    """The last one that was evaluated."""
    best_eval_loss: Best | None
    training_seconds: float | None
    """Time in steps, over all starts of the run; without loading, evaluating and saving."""
    tokens_per_second: float | None
    """Over all steps that were logged."""
    peak_memory_bytes: int | None
    planned_memory_bytes: int | None
    started: str | None
    """When the run was started last, in ISO 8601."""
    updated: str | None
    """When run.json was written last."""
    metrics: dict[str, float]
    """The last value of every metric."""
    results: dict[str, float]
    """What was measured after training, see `RunFiles.results`."""
    error: str | None
    problems: list[str]
    files: RunFiles = field(repr=False)

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """Read a run's folder. Raises CheckpointError where it holds no run."""
        files = read_run(folder)
        losses, evaluations = files.values("loss"), files.values("eval_loss")
        texts = {name: value for name, value in files.record.items() if isinstance(value, str)}
        numbers = {name: int(value) for name, value in files.record.items() if is_number(value)}
        last: dict[str, Any] = {}
        for row in files.metrics:
            last |= {name: value for name, value in row.items() if name not in ("step", "epoch")}
        peaks = [value for _, value in files.values("peak_memory_bytes")] + [numbers.get("peak_memory_bytes", 0)]
        seconds = _training_seconds(files)
        return cls(
            folder=files.folder, status=files.status, model=_text(files.settings.get("model")),
            stage=plugin_of(files, "stage_config"), method=plugin_of(files, "peft_config") or "full",
            step=max((row["step"] for row in files.metrics), default=0), steps=numbers.get("steps"),
            loss=losses[-1][1] if losses else None, best_loss=_best(losses),
            eval_loss=evaluations[-1][1] if evaluations else None, best_eval_loss=_best(evaluations),
            training_seconds=seconds, tokens_per_second=last["tokens"] / seconds if seconds else None,
            peak_memory_bytes=int(max(peaks)) or None, planned_memory_bytes=numbers.get("planned_memory_bytes"),
            started=texts.get("started"), updated=texts.get("updated"), metrics=last, results=dict(files.results),
            error=texts.get("error"), problems=files.problems, files=files,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """All of it but the files, for JSON."""
        given = {name: value for name, value in vars(self).items() if name != "files"}
        shown = {name: asdict(value) if isinstance(value, Best) else value for name, value in given.items()}
        return _finite({**shown, "folder": str(self.folder), "settings": dict(self.files.settings)})

    def __str__(self) -> str:
        record = self.files.record
        command = record.get("command")
        of = f" of {self.steps}" if self.steps else ""
        rows = [
            ("Run", str(self.folder)),
            ("Status", self.status + (f": {self.error}" if self.error else "")),
            ("Command", " ".join(map(str, command)) if isinstance(command, list) else None),
            ("Started", self.started),
            ("Updated", self.updated),
            ("Model", self.model),
            ("Stage", f"{self.stage}, {self.method}" if self.stage else None),
            ("Data", dataset_text(self.files.settings.get("dataset"))),
            ("Machine", self._machine()),
            ("Steps", f"{self.step}{of}" + self._pace()),
            ("Memory", self._memory()),
            ("Loss", _losses(self.loss, self.best_loss)),
            ("Eval loss", _losses(self.eval_loss, self.best_eval_loss)),
            *((f"{'Results' if not at else ''}", text) for at, text in enumerate(self._results())),
            *(("Problem", problem) for problem in self.problems),
        ]  # fmt: skip
        lines = [f"{name:<12}{text}" for name, text in rows if text]
        return "\n".join([*lines, "", loss_table(self.files.metrics)])

    def _machine(self) -> str | None:
        record = self.files.record
        if "device" not in record:
            return None
        packages = record.get("packages")
        packages = packages if isinstance(packages, dict) else {}
        names = [f"{name} {packages[name]}" for name in ("llmtune", "torch", "transformers") if name in packages]
        return f"{record['device']}, {counted(record.get('ranks', 1), 'rank')}, {listed(names)}"

    def _pace(self) -> str:
        if not self.training_seconds:
            return ""
        return f", {duration(self.training_seconds)} in steps, {self.tokens_per_second:,.0f} tokens a second"

    def _memory(self) -> str | None:
        if self.peak_memory_bytes is None:
            return None
        planned = (
            f", {self.planned_memory_bytes / GIB:.2f} GiB planned for tensors" if self.planned_memory_bytes else ""
        )
        return f"{self.peak_memory_bytes / GIB:.2f} GiB at most on a rank{planned}"

    def _results(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self.results.items()]


def plugin_of(files: RunFiles, point: str) -> str | None:
    """The plugin that a run used at an extension point."""
    block = files.settings.get(point)
    return _text(block.get("name") if isinstance(block, dict) else block)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def dataset_text(dataset: Any) -> str | None:
    """Data sets in a few words."""
    entries = dataset if isinstance(dataset, list) else [dataset] if dataset else []
    return listed([each.get("path") if isinstance(each, dict) else each for each in entries], 3) or None


def _losses(last: float | None, best: Best | None) -> str | None:
    if last is None:
        return None
    return f"{last:.4f}" + (f", lowest {best.value:.4f} at step {best.step}" if best else "")


def _best(values: list[tuple[int, float]]) -> Best | None:
    finite = [(value, step) for step, value in values if math.isfinite(value)]
    return Best(*min(finite)) if finite else None


def _training_seconds(files: RunFiles) -> float | None:
    """The sum over logged lines of their tokens through their speed: exact, and whole for a run in several starts."""
    seconds, before = 0.0, 0
    for row in files.metrics:
        if row.get("tokens_per_second") and "tokens" in row:
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return seconds or None


def _finite(value: Any) -> Any:
    """A copy with text in the place of numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
