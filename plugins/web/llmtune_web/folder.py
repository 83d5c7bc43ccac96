"""The folder that the page shows: its recipes and runs, and nothing that lies elsewhere."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune import PlanError

OWN = ".llmtune-web"
"""Where the page keeps what it knows of the processes that it started."""
_RECORD = "run.json"
_DEEPEST = 4
_RECIPES = (".yaml", ".yml")
_WRITTEN = ("output_dir", "export_dir", "tokenized_path", "cache_dir")
"""Keys whose folder need not be there yet."""


@dataclass(frozen=True)
class Folder:
    """A folder, and others that recipes may read from."""

    root: Path
    """Its real path, without links."""
    others: tuple[Path, ...] = ()

    @classmethod
    def of(cls, root: str | Path, others: tuple[Path, ...] = ()) -> Folder:
        """The folder with its real path. Raises PlanError where one of the others is none."""
        for other in others:
            if not other.expanduser().is_dir():
                raise PlanError(f"folders: found no folder at {other}")
        return cls(Path(root).resolve(), tuple(other.expanduser().resolve() for other in others))

    def path(self, name: str, *, reading: bool = False) -> Path:
        """The real path of a name that a user typed, counted from the root. Raises PlanError where it lies outside;
        for `reading`, outside of the other folders as well."""
        if "\0" in name:
            raise PlanError("a name has no null characters")
        path = (self.root / os.path.expanduser(name)).resolve()
        allowed = [self.root, *(self.others if reading else ())]
        if not any(path.is_relative_to(folder) for folder in allowed):
            hint = "; name its folder when the page is started, with folders=[...]" if reading else ""
            raise PlanError(f"{name}: lies outside of {self.root}, of which alone this page shows files{hint}")
        return path

    def shown(self, path: Path) -> str:
        """A path as a user reads it: from the root where it is below it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def recipes(self) -> list[str]:
        """YAML files that may be recipes, the nearest first."""
        found = (path for path in self._walk() if path.suffix in _RECIPES)
        return sorted(map(self.shown, found), key=lambda name: (name.count("/"), name))

    def run_folders(self) -> list[Path]:
        """Folders in which a run may have been written."""
        return [path.parent for path in self._walk() if path.name == _RECORD]

    def _walk(self) -> Iterator[Path]:
        """Files down to a few levels; of a run's folder only the record."""
        waiting = [(self.root, 0)]
        while waiting:
            folder, depth = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    here = [entry for entry in entries if not entry.name.startswith(".")]
            except OSError:  # of another user, or gone by now
                continue
            if any(entry.name == _RECORD for entry in here):
                yield folder / _RECORD
                continue
            for entry in here:
                if entry.is_dir(follow_symlinks=False):
                    waiting += [(Path(entry.path), depth + 1)] if depth < _DEEPEST else []
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)

    def read_recipe(self, name: str) -> str:
        """The text of a recipe's file. Raises PlanError where it is none, or lies outside."""
        path = self.path(name)
        if path.suffix not in _RECIPES or not path.is_file():
            raise PlanError(f"{name}: found no recipe; recipes are files whose names end in .yaml or .yml")
        return path.read_text(encoding="utf-8", errors="replace")

    def write_recipe(self, name: str, text: str) -> Path:
        """Write a recipe's file, in one step. Raises PlanError for another kind of file, or one that lies outside."""
        path = self.path(name)
        kept = path.is_relative_to(self.root / OWN) or any((above / _RECORD).exists() for above in path.parents)
        if path.suffix not in _RECIPES or kept:
            raise PlanError(
                f'{name or "no name"}: a recipe is saved under a name that ends in .yaml, in no run; try "recipe.yaml"'
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(f"{text.rstrip()}\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    def outside(self, text: str) -> list[str]:
        """What a recipe's text names that lies outside: a sentence for each key."""
        try:
            tree: Any = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text) or {}), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError):
            return []  # which llmtune says better
        problems = []
        for key, value in _texts(tree):
            try:
                for name in [value, *(part.strip() for part in value.split(","))]:
                    self._check(key, name.removeprefix("file://"))
            except PlanError as error:
                problems.append(f"{key}: {error}")
        return problems

    def _check(self, key: str, name: str) -> None:
        if not name or "\0" in name or len(name) > 4096:
            return
        written = key.partition(".")[0] in _WRITTEN
        if found := name if written else self._found(os.path.expanduser(name)):
            self.path(found, reading=not written)

    def _found(self, name: str) -> str | None:
        """The first file that a text may stand for, if there is any."""
        path = str(self.root / name)
        return next((each for each in (path, os.path.normpath(path)) if os.path.lexists(each)), None) or next(
            glob.iglob(path), None
        )


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield key, tree
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _texts(value, f"{key}.{name}" if key else str(name))


def safe_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"
