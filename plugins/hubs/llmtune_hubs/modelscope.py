"""ModelScope, through its library modelscope_hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune import HubUnreachable, NotOnHub, Repository, RepositoryFiles

_DEFAULT = "master"
"""The branch that ModelScope's repositories have."""


@dataclass(frozen=True)
class ModelScope:
    """A `Hub`."""

    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    title = "ModelScope"
    registry_key = "ms_hub_url"
    read_by_datasets = False

    def files(self, repository: Repository) -> RepositoryFiles:
        revision = repository.revision or _DEFAULT
        try:
            there = self._api(repository).list_repo_files(repository.name, repository.kind, revision=revision)
        except Exception as error:
            raise _told(error, repository) from error
        return RepositoryFiles(revision=revision, sha256={file.path: file.sha256 for file in there if not file.is_dir})

    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        try:
            return self._fetch(repository, allow_patterns=list(names))
        except Exception as error:
            raise _told(error, repository) from error

    def cached(self, repository: Repository) -> Path | None:
        from modelscope_hub import CacheError

        try:
            return self._fetch(repository, local_files_only=True)
        except CacheError:
            return None

    def _fetch(self, repository: Repository, **how: Any) -> Path:
        return self._api(repository).download_repo(
            repository.name, repository.kind, revision=repository.revision or _DEFAULT, cache_dir=repository.cache_dir,
            **how,
        )  # fmt: skip

    def _api(self, repository: Repository) -> Any:
        from modelscope_hub import HubApi

        return HubApi(endpoint=self.endpoint, token=self.token or repository.token)


def _told(error: Exception, repository: Repository) -> Exception:
    """What an error of modelscope_hub means for the user."""
    from modelscope_hub import AuthenticationError, NotExistError, PermissionDeniedError, RateLimitError

    name, kind = repository.name, repository.kind
    at = f" at revision {repository.revision}" if repository.revision else ""
    if isinstance(error, NotExistError):
        said = f"ModelScope has no {kind} {name}{at}, nor is there a folder of that name here; check the spelling"
        return NotOnHub(f"{said}, or for a private {kind} set hub_config.token")
    if isinstance(error, (AuthenticationError, PermissionDeniedError)):
        return NotOnHub(f"ModelScope refuses access to {name}; set hub_config.token to one that may read it")
    if isinstance(error, RateLimitError):
        return NotOnHub(f"ModelScope answers that there were too many requests for {name}; wait, or set a token")
    first_line = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    return HubUnreachable(f"ModelScope could not be reached ({first_line})")
