"""Runs beside each other: the settings in which they differ, and what they have come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmtune.contract.errors import listed
from llmtune.contract.extension_points import POINTS
from llmtune.contract.schema import defaults
from llmtune.history.cells import best_text, labels, loss_text, memory_text, steps_text, time_text, value_text
from llmtune.history.summary import RunSummary
from llmtune.recipe.registry import Registry
from llmtune.terminal import Shown, table_text

PLACES = {"output_dir", "export_dir", "overwrite_output_dir", "resume_from_checkpoint", "token", "logger_config"}
"""Settings that say where a run is kept and told of, not what it does."""
CHANGE_THE_LOSS = {
    "dataset", "eval_dataset", "dataset_dir", "template", "template_kwargs", "stage_config", "train_on_prompt",
    "mask_history", "cutoff_len", "val_size", "max_samples", "default_system", "enable_thinking", "model",
    "new_special_tokens",
}  # fmt: skip
"""Runs that differ here may not take their loss over the same tokens."""


@dataclass(frozen=True)
class RunComparison(Shown):
    """Runs, compared."""

    runs: Sequence[RunSummary]
    width: int = 100
    """Columns that the text takes at most, where one run fits into them."""

    @cached_property
    def settings(self) -> dict[str, list[Any]]:
        """Each setting in which the runs differ, with its value in each; None where a run does not have it. A plugin's
        key that a run leaves out has its default there."""
        found = [_settings(run) for run in self.runs]
        if lacking := [name for name, values in differing(found, PLACES).items() if "." in name and None in values]:
            registry = Registry()
            for name in lacking:
                point, _, key = name.partition(".")
                for each in found:
                    _fill(each, point, key, registry)
        return differing(found, PLACES)

    @property
    def surroundings(self) -> dict[str, list[Any]]:
        """What else differs: device, ranks, number types that were chosen, versions of packages and plugins."""
        return differing([_surroundings(run) for run in self.runs])

    @property
    def note(self) -> str | None:
        """A sentence where losses cannot be compared as they are."""
        found = [name for name in self.settings if name.partition(".")[0] in CHANGE_THE_LOSS]
        if not found:
            return None
        return f"Losses may be over other tokens, and not comparable: the runs differ in {listed(found)}."

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "runs": [run.as_dict() for run in self.runs],
            "settings": self.settings, "surroundings": self.surroundings, "note": self.note,
        }  # fmt: skip

    def __str__(self) -> str:
        groups = [
            ("settings", {name: list(map(value_text, values)) for name, values in self.settings.items()}),
            ("surroundings", {name: list(map(value_text, values)) for name, values in self.surroundings.items()}),
            ("results", dict(self._results())),
        ]
        names, parts = labels([run.folder for run in self.runs]), []
        for chosen in self._blocks(groups, names):
            head = ["", *(names[at] for at in chosen)]
            rows: list[list[str]] = []
            for title, group in groups:
                if group:
                    rows += [[""] * len(head)] if rows else []
                    rows += [[f"{title}:", *[""] * len(chosen)]]
                    rows += [[f"  {name}", *(values[at] for at in chosen)] for name, values in group.items()]
            parts.append(table_text(head, rows, left={0}, width=10_000))
        if not self.settings:
            parts.append("The runs have the same settings.")
        return "\n\n".join([*parts, *filter(None, [self.note])])

    def _blocks(self, groups: Sequence[tuple[str, Mapping[str, Sequence[str]]]], names: list[str]) -> Iterator[range]:
        """The runs in as many tables as the width asks for, one below the other."""
        rows = [(name, values) for _, group in groups for name, values in group.items()]
        left = max(len(name) for name, _ in rows) + 2
        widths = [max([len(names[at]), *(len(values[at]) for _, values in rows)]) + 2 for at in range(len(names))]
        start = 0
        while start < len(names):
            stop = start + 1
            while stop < len(names) and left + sum(widths[start : stop + 1]) <= self.width:
                stop += 1
            yield range(start, stop)
            start = stop

    def _results(self) -> Iterator[tuple[str, list[str]]]:
        columns = {
            "status": lambda run: run.status, "steps": steps_text, "time in steps": time_text,
            "tokens a second": lambda run: f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "",
            "memory": memory_text, "loss": lambda run: loss_text(run.loss),
            "lowest loss": lambda run: best_text(run.best_loss), "eval loss": lambda run: loss_text(run.eval_loss),
            "lowest eval loss": lambda run: best_text(run.best_eval_loss),
        }  # fmt: skip
        for name, text in columns.items():
            if any(values := [text(run) for run in self.runs]):
                yield name, values
        shown = {"loss", "eval_loss"}
        measured = [
            {name: value for name, value in run.metrics.items() if name not in shown and _tells(name)} | run.results
            for run in self.runs
        ]
        for name in dict.fromkeys(name for found in measured for name in found):
            yield name, [f"{found[name]:.4g}" if name in found else "" for found in measured]


def _tells(metric: str) -> bool:
    """Whether a logged metric says how good a model is, rather than how training goes."""
    return metric.startswith(("eval_", "reward"))


def differing(settings: Sequence[Mapping[str, Any]], but: Set[str] = frozenset()) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all, each with its value in each."""
    names = dict.fromkeys(name for each in settings for name in each)
    found = {name: [each.get(name) for each in settings] for name in names if name.partition(".")[0] not in but}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _settings(run: RunSummary) -> dict[str, Any]:
    return _flat(run.files.settings)


def _fill(settings: dict[str, Any], point: str, key: str, registry: Registry) -> None:
    """Write the default of a plugin's key where the run has that plugin, and leaves the key out."""
    plugin = settings.get(f"{point}.name", settings.get(point))
    if f"{point}.{key}" not in settings and isinstance(plugin, str):
        settings.setdefault(f"{point}.name", plugin)
        settings.pop(point, None)
        offered = registry.offered(point, plugin) if point in POINTS else None
        value = defaults(offered.config).get(key) if offered else None
        if value is not None:
            settings[f"{point}.{key}"] = list(value) if isinstance(value, tuple) else value


def _surroundings(run: RunSummary) -> dict[str, Any]:
    record = run.files.record
    names = ("device", "ranks", "rows", "decided", "model_revision", "model_fingerprint", "python", "packages")
    plugins = record.get("plugins")
    return _flat({name: record[name] for name in names if name in record}) | {
        f"plugins.{name}": label for name, label in (plugins.items() if isinstance(plugins, dict) else ())
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists stay whole. A plugin that is named without keys stays its name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + str(key)] = value
    return found
