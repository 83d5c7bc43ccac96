"""Packages that offer plugins, as far as their metadata tells: nothing is imported here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, entry_points, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from llmtune import __version__
from llmtune.contract.errors import PluginError
from llmtune.contract.schema import split_names

GROUP = "llmtune"
"""Entry point group; an entry's name is the name of a plugin that its module offers."""
BLOCK = "LLMTUNE_BLOCK_PLUGINS"
"""Environment variable: plugin or package names, separated by commas, that are not used."""
OBSERVE = "LLMTUNE_OBSERVERS"
"""Environment variable: entry point names whose modules may watch runs though no recipe names them."""


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """A module that offers plugins, with the package it comes from."""

    module: str
    """`package.module`, or `package.module:object`."""
    distribution: str
    version: str
    names: tuple[str, ...]
    """Its entry point names."""
    requires: tuple[str, ...] = ()
    """The package's own requirements."""

    @property
    def label(self) -> str:
        """Package and version."""
        return f"{self.distribution} {self.version}"


CORE = PackageSource(
    module="llmtune.recipe.builtin", distribution="llmtune", version=__version__,
    names=("fsdp2", "huggingface", "torchrun", "auto", "alpaca", "sharegpt", "openai", "completion", "preference",
           "kto", "prompt", "text", "tokens"),
)  # fmt: skip
"""What ships with the core, without entry points."""


def installed() -> list[PackageSource]:
    """The modules named in packages' metadata, in the order of package names. Imports nothing."""
    return list(_installed(tuple((folder, _changed(folder)) for folder in sys.path)))


def _changed(folder: str) -> int | None:
    """When something was last put into a folder of packages, or taken out, in ns; None where there is no folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=4)
def _installed(folders: tuple[tuple[str, int | None], ...]) -> tuple[PackageSource, ...]:
    """What is in these folders. Each run asks several times, and there are hundreds of packages to look through."""
    packages: dict[Distribution | None, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        packages.setdefault(entry.dist, []).append(entry)
    sources = []
    for dist, entries in packages.items():
        about = dist.metadata if dist else {"Name": "unknown", "Version": "?"}  # parsed anew each time it is asked for
        modules: dict[str, list[str]] = {}
        for entry in entries:
            modules.setdefault(entry.value, []).append(entry.name)
        sources += [
            PackageSource(
                module=module, distribution=about["Name"], version=about["Version"], names=tuple(sorted(names)),
                requires=tuple(dist.requires or ()) if dist else (),
            )
            for module, names in modules.items()
        ]  # fmt: skip
    return tuple(sorted(sources, key=lambda source: (source.distribution, source.module)))


def usable(source: PackageSource, name: str) -> None:
    """PluginError if metadata alone says that `name` of this package cannot be used."""
    if blocked(source, name):
        raise PluginError(f'"{name}" of {source.label} is blocked by {BLOCK}; take it out of that variable to use it')
    if problem := wants_other_llmtune(source):
        raise PluginError(f'"{name}": {problem}')


def unmet(text: str) -> str | None:
    """Why a Python requirement is not met, in a word or two; None if it is."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        return "not a valid requirement"
    if wanted.marker and not wanted.marker.evaluate():
        return None
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return "not installed"
    return None if wanted.specifier.contains(found, prereleases=True) else f"found {found}"


def wants_other_llmtune(source: PackageSource) -> str | None:
    """A sentence if the package's own requirements exclude this llmtune."""
    for text in source.requires:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        ours = canonicalize_name(wanted.name) == "llmtune" and (
            not wanted.marker or wanted.marker.evaluate({"extra": ""})
        )
        if ours and not wanted.specifier.contains(__version__, prereleases=True):
            return (
                f"{source.label} is made for llmtune {wanted.specifier}, this is {__version__}; update one of the two"
            )
    return None


def blocked(source: PackageSource, name: str) -> bool:
    """Whether the environment variable names this plugin or its package."""
    entries = split_names(os.environ.get(BLOCK))
    return name in entries or canonicalize_name(source.distribution) in {canonicalize_name(entry) for entry in entries}
