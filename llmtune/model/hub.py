"""Fetching from a hub: safetensors and text files only, compared with the hashes that the hub states."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from llmtune.contract.errors import LoadError, did_you_mean, listed
from llmtune.contract.hubs import Hub, HubUnreachable, NotOnHub, Repository
from llmtune.folders import size_and_hash
from llmtune.model.huggingface import HuggingFace
from llmtune.model.weight_files import WHOLE, missing_weights, no_weights

_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")


def fetch(repository: Repository, hub: Hub, *, weights: bool, code: bool = False) -> tuple[Path, str | None, str]:
    """A model's folder in the hub's cache, the commit it holds where that is known, and a note (empty unless the
    cache stood in).

    `weights` also fetches the safetensors files, `code` also Python files. Raises as `Download.run` does, and LoadError
    for a model without safetensors.
    """
    return Download(repository, hub, "model").run(
        lambda names: _model_files(names, repository.name, weights=weights, code=code),
        lambda folder: _missing(folder, ["config.json"]) + (missing_weights(folder) if weights else []),
    )


def fetch_files(
    repo: str,
    names: Sequence[str],
    *,
    key: str,
    cache_dir: Path | str | None = None,
    token: str | None = None,
    hub: Hub | None = None,
) -> Path:
    """The folder in the hub's cache that holds the files `names` of `repo`, which may end in `@revision`.

    For plugins whose `key` of the recipe may name a repository; `hub`, `cache_dir` and `token` are those of their
    `RunContext`. Raises LoadError: see `Download.run`.
    """
    repo, _, revision = repo.partition("@")

    def choose(there: list[str]) -> list[str]:
        if lacking := [name for name in names if name not in there]:
            raise LoadError(f"{key}: {repo} on the hub has no {listed(lacking)}; name another repository")
        return list(names)

    repository = Repository(name=repo, revision=revision or None, cache_dir=cache_dir, token=token)
    return Download(repository, hub or HuggingFace(), key).run(choose, lambda folder: _missing(folder, names))[0]


OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""Errors of the system that are no hub's: a cache that cannot be written."""


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of a cache is named by; None where it is named by a branch, as ModelScope's are."""
    return folder.name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", folder.name) else None


@dataclass(frozen=True)
class Download:
    """Files of one repository on a hub, wanted for one key of a recipe."""

    repository: Repository
    hub: Hub
    key: str
    """The recipe's key, for sentences."""

    def run(
        self, choose: Callable[[list[str]], list[str]], lacking: Callable[[Path], list[str]]
    ) -> tuple[Path, str | None, str]:
        """The files that `choose` picks of the repository's: their folder, the commit where the hub says which it is,
        and a note as in `fetch`.

        A file that arrives is compared with the hash that the hub states. Raises HubUnreachable if the hub does not
        answer and the cache's folder is `lacking` some, LoadError for a repository that does not exist or is gated, and
        for a damaged download.
        """
        try:
            there = self.hub.files(self.repository)
            names = choose(list(there.sha256))
            known = self.hub.cached(replace(self.repository, revision=there.revision))
            new = [name for name in names if known is None or not (known / name).exists()]
            folder = self.hub.download(self.repository, names)
            self._compare_hashes(folder, {name: there.sha256[name] for name in new})
        except NotOnHub as error:
            at = "revision" if error.revision_only and self.key == "model" else self.key
            raise LoadError(f"{at}: {error}") from error
        except HubUnreachable as error:
            if isinstance(cause := error.__cause__, OSError) and cause.errno in OF_THIS_MACHINE:
                at = cause.filename or self.repository.cache_dir or "the cache"
                raise LoadError(
                    f"cache_dir: files of {self.repository.name} cannot be kept in {at} ({cause.strerror}); free some "
                    "space, or set cache_dir to another folder"
                ) from error
            return self._from_cache(lacking, error)
        return folder, commit_of(folder), ""

    def _compare_hashes(self, folder: Path, stated: dict[str, str | None]) -> None:
        """LoadError, and the file is gone, where one has another content than the hub says it has."""
        for name, expected in stated.items():
            file = folder / name
            if expected is None or (sha256 := size_and_hash(file)[1]) == expected:
                continue
            file.resolve().unlink()
            file.unlink(missing_ok=True)
            raise LoadError(
                f"{self.key}: {name} of {self.repository.name} arrived damaged (SHA-256 {sha256[:12]}..., the hub says "
                f"{expected[:12]}...) and was deleted; run the same command again to fetch it anew"
            )

    def _from_cache(self, lacking: Callable[[Path], list[str]], error: HubUnreachable) -> tuple[Path, str | None, str]:
        folder, name = self.hub.cached(self.repository), self.repository.name
        if folder is None or (missing := lacking(folder)):
            lacks = f"; its cache lacks {listed(missing)}" if folder else ""
            raise HubUnreachable(
                f"{self.key}: there is no folder {name} here.{_near(name)} Taken as a name on {self.hub.title}, it "
                f"is not in the cache, and {error}{lacks}. Connect to the network once, or give a local folder"
            ) from error
        commit = commit_of(folder)
        which = f"commit {commit[:12]}" if commit else folder.name
        return folder, commit, f"{name} comes from the hub's cache, {which}, as {error}."


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
