"""The Hugging Face hub: quick to notice an absent network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.contract.hubs import HubUnreachable, NotOnHub, Repository, RepositoryFiles


@dataclass(frozen=True)
class HuggingFace:
    """A `Hub`, through huggingface_hub, whose variables and login it shares."""

    title = "the hub"
    registry_key = "hf_hub_url"
    read_by_datasets = True

    def files(self, repository: Repository) -> RepositoryFiles:
        from huggingface_hub import HfApi

        how: dict[str, Any] = {"timeout": repository.patience_s, "files_metadata": True}
        try:
            api = HfApi(token=repository.token)
            ask = api.dataset_info if repository.kind == "dataset" else api.model_info
            info = ask(repository.name, revision=repository.revision, **how)
        except Exception as error:
            raise _told(error, repository) from error
        stated = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else None for sibling in info.siblings or ()}
        return RepositoryFiles(revision=str(info.sha), sha256=stated)

    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        try:
            return self._snapshot(repository, allow_patterns=list(names))
        except Exception as error:
            raise _told(error, repository) from error

    def cached(self, repository: Repository) -> Path | None:
        try:  # any pattern will do: nothing is fetched
            return self._snapshot(repository, local_files_only=True, allow_patterns="*.md")
        except OSError:  # huggingface_hub's LocalEntryNotFoundError is one
            return None

    def _snapshot(self, repository: Repository, **how: Any) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository.name, repo_type=repository.kind, revision=repository.revision,
                cache_dir=repository.cache_dir, token=repository.token, **how,
            )
        )  # fmt: skip


def _told(error: Exception, repository: Repository) -> Exception:
    """What an error of huggingface_hub means for the user."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    if isinstance(error, HFValidationError):
        return NotOnHub(f'"{repository.name}" is neither a folder here nor a hub id; a hub id is written "owner/name"')
    # Transport errors: their classes belong to httpx, httpx2 or the system, depending on huggingface_hub.
    if isinstance(error, HfHubHTTPError) and (sentence := _refusal(error, repository)):
        refusal = NotOnHub(sentence)
        refusal.revision_only = isinstance(error, RevisionNotFoundError)
        return refusal
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable("HF_HUB_OFFLINE is set")
    first_line = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    return HubUnreachable(f"the hub could not be reached ({first_line})")


def _refusal(error: Exception, repository: Repository) -> str | None:
    """What an answer of the hub means; None if the hub itself is out of order."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    name, kind = repository.name, repository.kind
    # Errors of several libraries come here.
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{name} is gated; accept its terms on {page}, then run `hf auth login` or set the recipe's token"
    if isinstance(error, RevisionNotFoundError):
        return f'{name} has no revision "{repository.revision}" on the hub; name a branch, a tag or a commit of it'
    return {
        401: f"the hub has no public {kind} {name} (401), nor is there a folder of that name here; check the "
        f"spelling, or for a private {kind} run `hf auth login` or set the recipe's token",
        403: f"the hub refuses access to {name} (403); the token in use may not read it",
        404: f"the hub has no {kind} {name} (404), nor is there a folder of that name here; check the spelling",
        429: f"the hub answers that there were too many requests (429) for {name}; wait, or log in with a token",
    }.get(status)
