"""Environment variables that documents of this field name: which are honoured here, and what there is instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmtune.contract.shipped import shipped

_ON = ("1", "true", "yes", "y", "on")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable, and what it does here."""

    subject: str
    about: str = ""
    """What it means, or what there is in its place."""
    sets: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The plugin of an extension point that a recipe then gets where it leaves the point out."""
    option: str = ""
    """The option of `llmtune train` that is taken from it where it is not given."""
    serve: str = ""
    """The key of `llmtune serve` that is taken from it where it is not given."""
    instead: str = ""
    """What is said where it is set, as it changes nothing here."""
    silent: Sequence[str] = field(default=("", "0", "false", "no", "off"), hash=False)
    """Values with which nothing is said."""

    @property
    def answer(self) -> str:
        """What it does here, as a sentence without its full stop."""
        if self.sets:
            ((point, name),) = self.sets.items()
            return f"an environment variable: set to 1, {point} is {name} where a recipe leaves it out; {self.about}"
        if self.option:
            return f"an environment variable that `llmtune train` takes for --{self.option}: {self.about}"
        if self.serve:
            return f"an environment variable that `llmtune serve` takes for {self.serve}: {self.about}"
        return self.instead or self.about


@cache
def variables() -> Mapping[str, Variable]:
    """All of them by name, in the order of `environment.yaml`."""
    found: dict[str, Variable] = {}
    for subject, rows in shipped("llmtune.contract", "environment.yaml").items():
        for names, row in rows.items():
            made = Variable(subject=subject, **(row if isinstance(row, dict) else {"about": row}))
            found |= dict.fromkeys(names.split(", "), made)
    return found


def is_on(name: str) -> bool:
    """Whether a variable that switches something is set to 1, true, yes or on."""
    return os.environ.get(name, "").lower() in _ON


def named_plugins() -> dict[str, tuple[str, str]]:
    """Extension points whose default the environment names: (plugin, variable)."""
    return {
        point: (plugin, name)
        for name, variable in variables().items()
        for point, plugin in variable.sets.items()
        if is_on(name)
    }


def remarks() -> Iterator[str]:
    """A line for each variable that is set and changes nothing here, though somebody may expect it to."""
    for name, variable in variables().items():
        if variable.instead and os.environ.get(name, "").lower() not in variable.silent:
            yield f"{name} is set: {variable.instead}"


def environment_table() -> str:
    """The tables of docs/environment.md: variables with one answer share a row."""
    parts = []
    for subject in dict.fromkeys(variable.subject for variable in variables().values()):
        rows: dict[str, list[str]] = {}
        for name, variable in variables().items():
            if variable.subject == subject:
                rows.setdefault(_cell(variable), []).append(f"`{name}`")
        lines = [f"| {', '.join(names)} | {cell} |" for cell, names in rows.items()]
        parts.append("\n".join([f"## {subject}", "| variable | here |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _cell(variable: Variable) -> str:
    if variable.sets:
        ((point, name),) = variable.sets.items()
        return f"honoured: `{point}: {name}` where a recipe leaves it out ({variable.about})"
    if variable.option:
        return f"honoured: `--{variable.option}` of `llmtune train` ({variable.about})"
    if variable.serve:
        return f"taken by `llmtune serve` for `{variable.serve}` ({variable.about})"
    return f"said when it is set: {variable.instead}" if variable.instead else variable.about


if __name__ == "__main__":
    page = Path(sys.argv[1])
    before = page.read_text(encoding="utf-8").partition("\n## ")[0]
    page.write_text(f"{before}\n{environment_table()}", encoding="utf-8")
