"""Fetching from the Hugging Face hub: safetensors and text files only, quick to notice an absent network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LoadError, did_you_mean, listed
from llmtune.folders import size_and_hash
from llmtune.model.weight_files import WHOLE, missing_weights, no_weights

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")


class HubUnreachable(LoadError):
    """No answer from the hub, and the files are not in its cache. Another source may help."""


def fetch(
    repo: str,
    *,
    revision: str | None,
    cache_dir: Path | str | None,
    token: str | None,
    weights: bool,
    code: bool = False,
    patience_s: float = 10.0,
) -> tuple[Path, str, str]:
    """A model's folder in the hub's cache, the commit it holds, and a note (empty unless the cache stood in).

    `weights` also fetches the safetensors files, `code` also Python files. Raises as `Download.run` does, and LoadError
    for a model without safetensors.
    """
    download = Download(repo, "model", revision, {"cache_dir": cache_dir, "token": token}, patience_s)
    return download.run(
        lambda names: _model_files(names, repo, weights=weights, code=code),
        lambda folder: _missing(folder, ["config.json"]) + (missing_weights(folder) if weights else []),
    )


def fetch_files(
    repo: str, names: Sequence[str], *, key: str, cache_dir: Path | str | None = None, token: str | None = None
) -> Path:
    """The folder in the hub's cache that holds the files `names` of `repo`, which may end in `@revision`.

    For plugins whose `key` of the recipe may name a repository. Raises LoadError: see `Download.run`.
    """
    repo, _, revision = repo.partition("@")

    def choose(there: list[str]) -> list[str]:
        if lacking := [name for name in names if name not in there]:
            raise LoadError(f"{key}: {repo} on the hub has no {listed(lacking)}; name another repository")
        return list(names)

    download = Download(repo, key, revision or None, {"cache_dir": cache_dir, "token": token})
    return download.run(choose, lambda folder: _missing(folder, names))[0]


@dataclass(frozen=True)
class Download:
    """Files of one repository on the hub, wanted for one key of a recipe."""

    repo: str
    key: str
    """The recipe's key, for sentences."""
    revision: str | None
    where: dict[str, Any] = field(repr=False)
    """huggingface_hub's `cache_dir` and `token`."""
    patience_s: float = 10.0
    """Seconds that the hub may take to answer."""

    def run(
        self, choose: Callable[[list[str]], list[str]], lacking: Callable[[Path], list[str]]
    ) -> tuple[Path, str, str]:
        """The files that `choose` picks of the repository's: their folder, the commit, and a note as in `fetch`.

        A file that arrives is compared with the hash that the hub states. Raises HubUnreachable if the hub does not
        answer (or `HF_HUB_OFFLINE` is set) and the cache's folder is `lacking` some, LoadError for a repository that
        does not exist or is gated, and for a damaged download.
        """
        from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        repo, revision, cache = self.repo, self.revision, self.where["cache_dir"]
        try:
            api = HfApi(token=self.where["token"])
            info = api.model_info(repo, revision=revision, timeout=self.patience_s, files_metadata=True)
            names = choose([sibling.rfilename for sibling in info.siblings or ()])
            new = [name for name in names if not isinstance(try_to_load_from_cache(repo, name, cache, info.sha), str)]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names, **self.where))
            self._compare_hashes(folder, new, info)
        except HFValidationError as error:
            raise LoadError(
                f'{self.key}: "{repo}" is neither a folder here nor a hub id; a hub id is written "owner/name"'
            ) from error
        except LoadError:
            raise
        except Exception as error:
            # Transport errors: their classes belong to httpx, httpx2 or the system, depending on huggingface_hub.
            if isinstance(error, HfHubHTTPError) and (sentence := self._refusal(error)):
                raise LoadError(sentence) from error
            return self._from_cache(lacking, error)
        return folder, folder.name, ""

    def _compare_hashes(self, folder: Path, names: list[str], info: ModelInfo) -> None:
        """LoadError, and the file is gone, where one of `names` has another content than the hub says it has."""
        stated = {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings or () if sibling.lfs}
        for name in names:
            file = folder / name
            if name not in stated or (sha256 := size_and_hash(file)[1]) == stated[name]:
                continue
            file.resolve().unlink()
            file.unlink(missing_ok=True)
            raise LoadError(
                f"{self.key}: {name} of {self.repo} arrived damaged (SHA-256 {sha256[:12]}..., the hub says "
                f"{stated[name][:12]}...) and was deleted; run the same command again to fetch it anew"
            )

    def _refusal(self, error: Exception) -> str | None:
        """What an answer of the hub means for the user; None if the hub itself is out of order."""
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        repo, key = self.repo, self.key
        # Errors of several libraries come here.
        status: int = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, GatedRepoError):
            return (
                f"{key}: {repo} is gated; accept its terms on https://huggingface.co/{repo}, then run `hf auth login` "
                "or set the recipe's token"
            )
        if isinstance(error, RevisionNotFoundError):
            at = "revision" if key == "model" else key
            return f'{at}: {repo} has no revision "{self.revision}" on the hub; name a branch, a tag or a commit of it'
        return {
            401: f"{key}: the hub has no public model {repo} (401), nor is there a folder of that name here; check the "
            "spelling, or for a private model run `hf auth login` or set the recipe's token",
            403: f"{key}: the hub refuses access to {repo} (403); the token in use may not read it",
            404: f"{key}: the hub has no model {repo} (404), nor is there a folder of that name here; check the "
            "spelling",
            429: f"{key}: the hub answers that there were too many requests (429) for {repo}; wait, or log in with a "
            "token",
        }.get(status)

    def _from_cache(self, lacking: Callable[[Path], list[str]], error: Exception) -> tuple[Path, str, str]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        offline = isinstance(error, OfflineModeIsEnabled)
        first_line = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub could not be reached ({first_line})"
        here: dict[str, Any] = {"local_files_only": True, "allow_patterns": "*.md"}  # any will do: nothing is fetched
        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, **here, **self.where))
        except OSError:  # huggingface_hub's LocalEntryNotFoundError is one
            folder = None
        if folder is None or (missing := lacking(folder)):
            lacks = f"; its cache lacks {listed(missing)}" if folder else ""
            raise HubUnreachable(
                f"{self.key}: there is no folder {self.repo} here.{_near(self.repo)} Taken as a name on the hub, it is "
                f"not in the cache, and {why}{lacks}. Connect to the network once, or give a local folder"
            ) from error
        return folder, folder.name, f"{self.repo} comes from the hub's cache, commit {folder.name[:12]}, as {why}."


def _model_files(names: list[str], repo: str, *, weights: bool, code: bool) -> list[str]:
    """Which files of a repository are fetched. LoadError if it has no safetensors."""
    top = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    files = [WHOLE] if WHOLE in top else [name for name in top if fnmatch(name, "model-*-of-*.safetensors")]
    files = files or [name for name in top if not name.startswith(("adapter", "consolidated"))]
    if not files:
        raise LoadError(no_weights(repo, names))
    patterns = (*_TEXT, "*.py") if code else _TEXT
    texts = [name for name in names if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)]
    return texts + files if weights else texts


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def _near(repo: str) -> str:
    """A word on a folder of this machine that the name may be meant for."""
    there = Path(repo).parent
    return did_you_mean(
        Path(repo).name, [one.name for one in there.iterdir() if one.is_dir()] if there.is_dir() else []
    )
