"""The stranger's hub, spoilt in one way each; its shelf is in the present folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acme_tuning.shelf import Shelf

from llmtune import HubUnreachable, Repository, RepositoryFiles


class Here(Shelf):
    def __init__(self) -> None:
        super().__init__(root="shelf")


class CannotTravel(Here):
    def __reduce__(self) -> str:
        raise TypeError("it is bolted to the wall")


class StatesOldHashes(Here):
    def files(self, repository: Repository) -> RepositoryFiles:
        found = super().files(repository)
        return RepositoryFiles(revision="shelf", sha256=dict.fromkeys(found.sha256, "0" * 64))


class FetchesEverything(Here):
    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        return super().download(repository, list(self.files(repository).sha256))


class ForgetsWhatItFetched(Here):
    def cached(self, repository: Repository) -> Path | None:
        return None


class IsNeverSure(Here):
    def files(self, repository: Repository) -> RepositoryFiles:
        if repository.name.endswith("absent"):
            raise HubUnreachable("perhaps it is asleep")
        return super().files(repository)
