"""Modelers, through its library openmind_hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune import HubUnreachable, NotOnHub, Repository, RepositoryFiles

_DEFAULT = "main"
"""The branch that repositories of Modelers have."""


@dataclass(frozen=True)
class Modelers:
    """A `Hub`."""

    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    title = "Modelers"
    registry_key = "om_hub_url"
    read_by_datasets = False

    def files(self, repository: Repository) -> RepositoryFiles:
        from openmind_hub import OmApi

        revision = repository.revision or _DEFAULT
        try:
            api = OmApi(**({"endpoint": self.endpoint} if self.endpoint else {}))
            there = api.list_repo_tree(
                repository.name, revision=revision, recursive=True, token=self.token or repository.token
            )
            stated = {file.path: file.lfs and file.lfs.get("sha256") for file in there if hasattr(file, "lfs")}
        except Exception as error:
            raise _told(error, repository) from error
        return RepositoryFiles(revision=revision, sha256=stated)

    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        from openmind_hub import snapshot_download

        how: dict[str, Any] = {"endpoint": self.endpoint} if self.endpoint else {}
        how |= {"cache_dir": repository.cache_dir} if repository.cache_dir else {}
        try:
            return Path(
                snapshot_download(
                    repository.name, repo_type=repository.kind, revision=repository.revision or _DEFAULT,
                    token=self.token or repository.token, allow_patterns=list(names), **how,
                )
            )  # fmt: skip
        except Exception as error:
            raise _told(error, repository) from error

    def cached(self, repository: Repository) -> Path | None:
        """Looked up in the library's cache itself, as the library asks its server even for what is here."""
        from openmind_hub import OM_HUB_CACHE

        place = Path(repository.cache_dir or OM_HUB_CACHE) / f"{repository.kind}s--{repository.name.replace('/', '--')}"
        revision = repository.revision or _DEFAULT
        reference = place / "refs" / revision
        folder = place / "snapshots" / (reference.read_text("utf-8").strip() if reference.is_file() else revision)
        return folder if folder.is_dir() else None


def _told(error: Exception, repository: Repository) -> Exception:
    """What an error of openmind_hub means for the user."""
    name, kind = repository.name, repository.kind
    # Its errors have the response of `requests`, or none.
    status = getattr(getattr(error, "response", None), "status_code", 0)
    at = f" at revision {repository.revision}" if repository.revision else ""
    if status == 404:
        said = f"Modelers has no {kind} {name}{at}, nor is there a folder of that name here; check the spelling"
        return NotOnHub(f"{said}, or for a private {kind} set hub_config.token")
    if status in (401, 403):
        return NotOnHub(f"Modelers refuses access to {name} ({status}); set hub_config.token to one that may read it")
    if status == 429:
        return NotOnHub(f"Modelers answers that there were too many requests for {name}; wait, or set hub_config.token")
    first_line = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    return HubUnreachable(f"Modelers could not be reached ({first_line})")
