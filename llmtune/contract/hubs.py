"""Where models, adapters and data sets come from: what a hub is asked, and what it keeps to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from llmtune.contract.errors import LoadError


class HubUnreachable(LoadError):
    """No answer from a hub. What it holds may still be in its cache, and another source may help."""


class NotOnHub(LoadError):
    """A hub's answer that it will not give a repository: there is none, or none for this user. The message says which,
    and what to do."""

    revision_only: bool = False
    """Whether the repository is there, and lacks the revision."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What is asked for on a hub, and how."""

    name: str
    """`owner/name`."""
    kind: Literal["model", "dataset"] = "model"
    """Adapters are models."""
    revision: str | None = None
    """Branch, tag or commit; None is the hub's default branch."""
    cache_dir: Path | str | None = None
    """Where downloads are kept; None is the hub's own place."""
    token: str | None = field(default=None, repr=False)
    """The recipe's `token`; None leaves it to the hub's own login."""
    patience_s: float = 10.0
    """Seconds that the hub may take to answer."""


@dataclass(frozen=True, kw_only=True)
class RepositoryFiles:
    """What a repository holds."""

    revision: str
    """The commit, where the hub says it, else the branch or tag."""
    sha256: Mapping[str, str | None]
    """Each file's path in the repository and its hash, None where the hub does not say it."""


class Hub(Protocol):
    """A place on the network that has repositories of files. It can be pickled: workers fetch, too."""

    title: str
    """What sentences call it, such as `the Hugging Face hub`."""
    registry_key: str
    """The key of `dataset_info.json` that names a data set on this hub, such as `hf_hub_url`."""
    read_by_datasets: bool
    """Whether the `datasets` library finds this hub's data sets by their names, and can stream them."""

    def files(self, repository: Repository) -> RepositoryFiles:
        """What the repository holds. Raises NotOnHub for refusals, HubUnreachable where the hub does not answer."""
        ...

    def download(self, repository: Repository, names: Sequence[str]) -> Path:
        """The folder that holds the files `names`, fetched as far as they are not there yet. Raises as `files` does."""
        ...

    def cached(self, repository: Repository) -> Path | None:
        """The folder with what was fetched before, some files or all; None where nothing was. Asks no network."""
        ...
