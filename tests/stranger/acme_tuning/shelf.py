"""A hub that is a folder: `ROOT/owner/name` is a repository."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune import NotOnHub, Repository, RepositoryFiles


@dataclass(frozen=True)
class Shelf:
    """A `Hub`."""

    root: str

    title = "the shelf"
    registry_key = "shelf"
    read_by_datasets = False

    def files(self, repository: Repository) -> RepositoryFiles:
        place = Path(self.root) / repository.name
        if not place.is_dir():
            raise NotOnHub(f"the shelf has no {repository.name}; look into {self.root}")
        found = [path for path in place.rglob("*") if path.is_file()]
        stated = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
        return RepositoryFiles(revision="shelf", sha256=stated)

    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        for name in names:
            target = self._kept(repository) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{os.getpid()}")  # ranks fetch at once, and read what is there
            shutil.copy(Path(self.root) / repository.name / name, part)
            part.replace(target)
        return self._kept(repository)

    def cached(self, repository: Repository) -> Path | None:
        return self._kept(repository) if self._kept(repository).is_dir() else None

    def _kept(self, repository: Repository) -> Path:
        return Path(repository.cache_dir or Path.home() / ".shelf") / repository.name / "shelf"
