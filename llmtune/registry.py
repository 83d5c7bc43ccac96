"""Find plugins by their packages' metadata, import only those a recipe names, and say clearly what is wrong.

An entry point of the group `llmtune` bears the name of a plugin that its module offers; a module may have several.
So a name leads to a module without importing any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

from llmtune import __version__, hookspecs
from llmtune.errors import PluginError, did_you_mean, listed
from llmtune.hookspecs import EXTENSION_POINTS
from llmtune.records import API_VERSION, Plugin

GROUP = "llmtune"
BLOCK = "LLMTUNE_BLOCK_PLUGINS"
"""Environment variable: comma list of plugin or package names that are not to be used."""


@dataclass(frozen=True)
class Entry:
    """One entry point: a name, the module behind it, and the package it comes from. Nothing is imported yet."""

    name: str
    module: str
    distribution: str
    version: str
    requires: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def blocked(self) -> bool:
        names = {name.strip().lower() for name in os.environ.get(BLOCK, "").split(",")}
        return bool(names & {self.name.lower(), self.distribution.lower()})

    @property
    def misfit(self) -> str | None:
        """Why the package is not for this llmtune, as its metadata says; None if it is."""
        for text in self.requires:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.name.lower() == "llmtune" and not need.specifier.contains(__version__, prereleases=True):
                return f"needs llmtune {need.specifier}, this is {__version__}"
        return None


@dataclass(frozen=True)
class Offer:
    """A plugin and who offers it."""

    point: str
    plugin: Plugin
    distribution: str
    version: str
    module: str


@dataclass(frozen=True)
class Listed:
    """One line of `llmtune plugins`."""

    point: str | None
    name: str
    package: str
    version: str
    state: str
    """`ok`, or `broken: ...`, `blocked`, `incompatible: ...`, `duplicate: ...`."""
    summary: str = ""
    requires: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()


def installed_entries() -> list[Entry]:
    """All entry points of the group, from metadata alone, and what ships with the core."""
    found = [Entry("fsdp2", "llmtune.builtin", "llmtune", __version__)]
    seen = set()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        for point in distribution.entry_points:
            # A package found twice on the path is the first one, as imports see it.
            if point.group == GROUP and (name, point.name) not in seen:
                seen.add((name, point.name))
                requires = tuple(distribution.requires or ())
                found.append(Entry(point.name, point.value, name, distribution.version, requires))
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


@dataclass
class Registry:
    """What is installed. Modules are imported when a name leads to them, once."""

    entries: list[Entry] = field(default_factory=installed_entries)
    _offers: dict[str, list[tuple[str, Plugin]]] = field(default_factory=dict)
    _modules: dict[str, ModuleType] = field(default_factory=dict)

    def find(self, point: str, name: str) -> Offer:
        """The plugin a recipe means by `name` at `point`. Raises PluginError: unknown, broken, blocked, twice, misfit."""
        named = [entry for entry in self.entries if entry.name == name]
        usable = [entry for entry in named if not entry.blocked]
        if named and not usable:
            raise PluginError(f'{point}: plugin "{name}" is blocked by {BLOCK}={os.environ[BLOCK]}; unset it to use the plugin')
        offers = [offer for entry in usable for offer in self._from_entry(entry, point)]
        if not offers:
            raise PluginError(self._unknown(point, name))
        if len(offers) > 1:
            packages = " and ".join(f"{offer.distribution} {offer.version}" for offer in offers)
            raise PluginError(
                f'{point}: "{name}" is offered by {packages}; uninstall one, or name one of these packages in {BLOCK}'
            )
        (offer,) = offers
        if lacking := unmet(offer.plugin.requires):
            raise PluginError(
                f"{point}: {name} of {offer.distribution} {offer.version} needs {', '.join(lacking)}; "
                f"run: pip install {' '.join(repr(need.split(' (')[0]) for need in lacking)}"
            )
        return offer

    def _from_entry(self, entry: Entry, point: str) -> list[Offer]:
        if reason := entry.misfit:
            raise PluginError(f'{point}: plugin "{entry.name}" of {entry.package} {reason}; install a version made for it')
        return [
            Offer(point, plugin, entry.distribution, entry.version, entry.module)
            for where, plugin in self.offers_of(entry)
            if where == point and plugin.name == entry.name
        ]

    def _unknown(self, point: str, name: str) -> str:
        known = sorted({item.name for item in self.listing() if item.point == point})
        elsewhere = sorted({item.point for item in self.listing() if item.name == name and item.point})
        hint = f" It is a plugin for {listed(elsewhere)}." if elsewhere else did_you_mean(name, known)
        return (
            f'{point}: no plugin "{name}" is installed.{hint} Installed: {listed(known) or "none"}. '
            f"Plugins are pip packages; see `llmtune plugins`"
        )

    def offers_of(self, entry: Entry) -> list[tuple[str, Plugin]]:
        """(extension point, plugin) pairs of the entry's module, imported and checked now. Raises PluginError."""
        if entry.module not in self._offers:
            try:
                module = import_module(entry.module.partition(":")[0])
            except Exception as error:
                raise PluginError(
                    f'plugin "{entry.name}" of {entry.package} cannot be imported: {type(error).__name__}: {error}'
                ) from error
            self._offers[entry.module] = list(collect_offers(module, entry))
            self._modules[entry.module] = module
        for _, plugin in self._offers[entry.module]:
            self._check_record(plugin, entry)
        return self._offers[entry.module]

    def _check_record(self, plugin: Plugin, entry: Entry) -> None:
        if plugin.api != API_VERSION:
            raise PluginError(
                f'plugin "{plugin.name}" of {entry.package} is made for version {plugin.api} of the plugin contract, '
                f"this llmtune has version {API_VERSION}; install a version made for it"
            )
        own = {e.name for e in self.entries if e.module == entry.module and e.distribution == entry.distribution}
        if plugin.name not in own:
            raise PluginError(
                f'{entry.package} offers a plugin "{plugin.name}" without an entry point of that name; add '
                f'{plugin.name} = "{entry.module}" to its [project.entry-points.llmtune]'
            )

    def listing(self) -> list[Listed]:
        """Every plugin that is installed, its module imported, errors noted instead of raised."""
        rows = [row for entry in self.entries for row in self._rows(entry)]
        places: dict[tuple[str | None, str], list[Listed]] = {}
        for row in rows:
            if row.state == "ok":
                places.setdefault((row.point, row.name), []).append(row)
        twice = {key: group for key, group in places.items() if len({row.package for row in group}) > 1}
        return [
            Listed(**{**vars(row), "state": f"duplicate: offered by {listed(r.package for r in twice[row.point, row.name])}"})
            if row.state == "ok" and (row.point, row.name) in twice
            else row
            for row in rows
        ]

    def _rows(self, entry: Entry) -> Iterator[Listed]:
        state = "blocked" if entry.blocked else f"incompatible: {entry.misfit}" if entry.misfit else None
        offers: list[tuple[str, Plugin]] = []
        if state is None:
            try:
                offers = [(point, plugin) for point, plugin in self.offers_of(entry) if plugin.name == entry.name]
            except PluginError as error:
                state = f"broken: {error}"
        if state or not offers:
            yield Listed(None, entry.name, entry.distribution, entry.version, state or "broken: its module offers no plugin of this name")
        for point, plugin in offers:
            yield Listed(
                point, plugin.name, entry.distribution, entry.version, "ok", plugin.summary, plugin.requires, tuple(unmet(plugin.requires))
            )

    def observers(self) -> list[Callable[..., Any]]:
        """`observe` of the modules imported so far: those a recipe named."""
        return [module.observe for module in self._modules.values() if hasattr(module, "observe")]


def collect_offers(module: ModuleType, entry: Entry) -> Iterator[tuple[str, Plugin]]:
    """Call a module's hooks through pluggy, which knows misspelt hooks and wrong arguments. Raises PluginError."""
    manager = pluggy.PluginManager("llmtune")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=entry.module)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"{entry.package}: {str(error).strip()}; known hooks: {listed([*EXTENSION_POINTS, 'observe'], 20)}") from error
    for point in EXTENSION_POINTS:
        try:
            results = getattr(manager.hook, point)()
        except Exception as error:
            raise PluginError(f"{entry.package}: its hook {point} failed: {type(error).__name__}: {error}") from error
        for result in results:
            plugins = list(result) if isinstance(result, Iterable) else [result]
            if not all(isinstance(item, Plugin) for item in plugins):
                raise PluginError(f"{entry.package}: its hook {point} returned {result!r}; it must return a list of llmtune.Plugin")
            yield from ((point, plugin) for plugin in plugins)


def unmet(requirements: Sequence[str]) -> list[str]:
    """Requirements that the environment does not meet, each with what was found."""
    lacking = []
    for text in requirements:
        need = Requirement(text)
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{need} (not installed)")
            continue
        if not need.specifier.contains(found, prereleases=True):
            lacking.append(f"{need} (found {found})")
    return lacking


def print_listing(rows: Sequence[Listed], as_json: bool = False) -> None:
    """For people, grouped by extension point; or as JSON."""
    if as_json:
        print(_as_json(rows))
        return
    groups: Mapping[str | None, list[Listed]] = {
        point: [row for row in rows if row.point == point] for point in (*EXTENSION_POINTS, None)
    }
    for point, group in groups.items():
        if point is None and not group:
            continue
        print(f"{point}: {question(point)}" if point else "Not usable")
        for row in group or []:
            print(f"  {row.name:<22}{f'{row.package} {row.version}':<28}{row.summary if row.state == 'ok' else row.state}")
            if row.unmet:
                print(f"{'':<52}needs {', '.join(row.unmet)}")
        if not group:
            print("  nothing installed")
        print()


def question(point: str) -> str:
    """The first line of an extension point's documentation."""
    return (getattr(hookspecs, point).__doc__ or "").splitlines()[0]


def _as_json(rows: Sequence[Listed]) -> str:
    points = {point: {"question": question(point), "plugins": []} for point in EXTENSION_POINTS}
    unusable = []
    for row in rows:
        (points[row.point]["plugins"] if row.point else unusable).append(vars(row))  # type: ignore[union-attr]
    return json.dumps({"extension_points": points, "not_usable": unusable}, indent=2)
