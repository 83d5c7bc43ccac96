"""What all parts of the page share: the folder, its processes, the form, and recipes as llmtune takes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llmtune
from llmtune import LlmtuneError, PlanError
from llmtune_web.folder import Folder, safe_name
from llmtune_web.form import Form
from llmtune_web.jobs import Jobs
from llmtune_web.yaml_text import Values

STARTER = """\
model: HuggingFaceTB/SmolLM2-135M-Instruct
dataset: llmtune:quickstart
peft_config: lora
cutoff_len: 512
"""
"""What a new recipe begins with."""


LIBRARIES: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "libraries"}
"""Of what loads models and templates: transformers keeps the number type of the moment for all threads."""


@dataclass(frozen=True)
class Desk:
    """A folder that is worked in."""

    folder: Folder
    jobs: Jobs
    form: Form

    @classmethod
    def at(cls, folder: Folder) -> Desk:
        """The desk of a folder, with the form of the plugins that are installed."""
        return cls(folder, Jobs(folder), Form(llmtune.recipe_schema()))

    @contextmanager
    def recipe_file(self, name: str, text: str) -> Iterator[Path]:
        """The recipe in a file for as long as the block runs. Raises PlanError where it leads outside of the folder."""
        if outside := self.folder.outside(text):
            raise PlanError("\n".join(outside))
        with TemporaryDirectory(prefix="llmtune-web-") as scratch:
            path = Path(scratch) / f"{safe_name(Path(name).stem)}.yaml"
            path.write_text(text, encoding="utf-8")
            try:
                yield path
            except LlmtuneError as error:
                raise PlanError(str(error).replace(str(path), name or path.name)) from error

    def problems(self, name: str, text: str) -> list[str]:
        """What is wrong with a recipe, as llmtune says it."""
        try:
            with self.recipe_file(name, text) as path:
                return [str(error).replace(str(path), name or path.name) for error in llmtune.recipe_errors(path)]
        except LlmtuneError as error:
            return str(error).splitlines()

    def output_dir(self, name: str, text: str) -> str:
        """The folder of a recipe's run, from the root. Raises PlanError where that lies outside."""
        given = Values(text).at("output_dir")
        usual = given if given and given != "null" else f"runs/{safe_name(Path(name).stem)}"
        return self.folder.shown(self.folder.path(usual))

    def runs(self) -> dict[str, Any]:
        """The runs below the folder by their names, as `llmtune.runs` reads them; the one written to last first."""
        found = [run for folder in self.folder.run_folders() if (run := _run_in(folder)) is not None]
        found.sort(key=lambda run: run.updated or "", reverse=True)
        return {self.folder.shown(run.folder): run for run in found}

    def model(self, name: str) -> str:
        """A run, a model's folder or a recipe inside of the folder by its path, anything else as a name on the hub.

        Raises PlanError where it lies outside."""
        name = name.strip()
        if not name:
            raise PlanError("model: not given; choose a run, or type a folder or a name on the hub")
        try:
            path = self.folder.path(name, reading=True)
        except PlanError:
            if name.startswith(("/", ".", "~")) or (self.folder.root / name).exists():
                raise
            return name
        if path.suffix in (".yaml", ".yml") and path.is_file() and (outside := self.folder.outside(path.read_text())):
            raise PlanError("\n".join(outside))
        return str(path) if path.exists() else name


def _run_in(folder: Path) -> Any:
    """The run in a folder, read again where a file of it was written; None where it holds none."""
    try:
        written = max(entry.stat().st_mtime_ns for entry in os.scandir(folder))
    except (OSError, ValueError):  # it is being deleted
        return None
    run = _read(folder, written)
    # Whether the process of one that runs is still there, no file tells.
    return _read.__wrapped__(folder, written) if run is not None and run.status == "running" else run


@lru_cache(maxsize=1024)
def _read(folder: Path, written: int) -> Any:
    return next(iter(llmtune.runs(folder)), None)


def word(path: str) -> str:
    """A path as a word of a command line, never an option."""
    return f"./{path}" if path.startswith("-") else path


def error_html(error: str | BaseException) -> str:
    """What went wrong, a line for each problem."""
    said = str(error) if isinstance(error, (LlmtuneError, str)) else f"{type(error).__name__}: {error}"
    return "".join(f'<p class="lt-error" role="alert">{escape(line)}</p>' for line in said.splitlines())


def shown(make: Callable[..., str]) -> Callable[..., str]:
    """`make`, whose errors are shown in the place of what it makes."""

    def safely(*arguments: Any) -> str:
        try:
            return make(*arguments)
        except Exception as error:  # whatever a model, a data set or a plugin raises is for the user to read
            return error_html(error)

    return safely
