"""Plugins: found by their packages' metadata, imported only when a recipe names them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from llmtune import __version__
from llmtune.contract.errors import PluginError, did_you_mean, listed, raise_all
from llmtune.contract.events import Event
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.hookspecs import HOOKS
from llmtune.contract.records import API_VERSION, Plugin
from llmtune.contract.schema import split_names
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.listing import Listed
from llmtune.recipe.packages import (
    BLOCK,
    CORE,
    GROUP,
    OBSERVE,
    PackageSource,
    blocked,
    installed,
    unmet,
    usable,
    wants_other_llmtune,
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A plugin, and who offers it."""

    point: str
    plugin: Plugin
    source: PackageSource

    @property
    def label(self) -> str:
        """Extension point, plugin and package, for errors that a plugin is to blame for."""
        return f'{self.point}: "{self.plugin.name}" of {self.source.label}'


class Registry:
    """The plugins of this environment. Making one reads metadata; nothing is imported."""

    def __init__(self, sources: Iterable[PackageSource] | None = None) -> None:
        self.sources = [CORE, *(installed() if sources is None else sources)]
        self._loaded: dict[PackageSource, _Module | PluginError] = {}
        self._used: list[PackageSource] = []

    def find(self, point: str, name: str) -> Offer:
        """The plugin that a recipe names. Raises PluginError: unknown, broken, blocked, made for another llmtune,
        offered twice, or missing a Python requirement."""
        offers: list[Offer] = []
        problems: list[PluginError] = []
        for source in self.sources:
            if name not in source.names:
                continue
            try:
                usable(source, name)  # metadata can rule a package out before it is imported
                found = [plugin for plugin in self._module(source).plugins(point) if plugin.name == name]
                offers += [Offer(point=point, plugin=plugin, source=source) for plugin in found]
            except PluginError as error:
                problem = PluginError(f"{point}: {error}")
                problem.__cause__ = error
                problems.append(problem)
        if not offers:
            raise_all(problems or [self._unknown(point, name)])
        _same_name(offers)
        (offer,) = offers
        check_plugin(offer)
        if offer.source not in self._used:
            self._used.append(offer.source)
        return offer

    def offered(self, point: str, name: str) -> Plugin | None:
        """The plugin of this name, whether or not what it needs is installed; None where no package offers it."""
        for source in self.sources:
            with contextlib.suppress(PluginError):
                if name in source.names:
                    usable(source, name)
                    plugins = self._module(source).plugins(point)
                    if found := next((plugin for plugin in plugins if plugin.name == name), None):
                        return found
        return None

    def observers(self) -> list[Callable[[Event], object]]:
        """What watches a run: `observe` of the modules whose plugins `find` has given, and of those that
        `LLMTUNE_OBSERVERS` names."""
        watching = list(self._used)
        for name in split_names(os.environ.get(OBSERVE)):
            sources = [source for source in self.sources if name in source.names]
            if not sources:
                known = sorted({name for source in self.sources for name in source.names})
                raise PluginError(f'{OBSERVE}: no package offers "{name}".{did_you_mean(name, known)}')
            watching += [source for source in sources if source not in watching]
            for source in sources:
                usable(source, name)
        modules = [self._module(source) for source in watching]
        return [module.observe for module in modules if module.manager.hook.observe.get_hookimpls()]

    def listing(self) -> list[Listed]:
        """Everything that is installed. Imports all modules; what goes wrong is in the listing."""
        rows = [row for source in self.sources for row in self._rows(source)]
        packages: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row.state == "ok" and row.plugin:
                packages.setdefault((row.point, row.name), []).append(f"{row.package} {row.version}")
        for number, row in enumerate(rows):
            several = packages.get((row.point, row.name), [])
            if row.state == "ok" and len(several) > 1:
                reason = f'{row.point} "{row.name}" is offered by {" and ".join(several)}'
                rows[number] = dataclasses.replace(row, state="duplicate", reason=reason)
        return rows

    def _rows(self, source: PackageSource) -> list[Listed]:
        def row(state: str, point: str, name: str, reason: object = "", **more: Any) -> Listed:
            return Listed(
                point=point, name=name, package=source.distribution, version=source.version, state=state,
                reason=str(reason), **more,
            )  # fmt: skip

        rows: list[Listed] = []
        free = [name for name in source.names if not blocked(source, name)]
        rows += [row("blocked", "", name, f"by {BLOCK}") for name in source.names if name not in free]
        if not free:
            return rows
        if problem := wants_other_llmtune(source):
            return [*rows, *(row("incompatible", "", name, problem) for name in free)]
        try:
            module = self._module(source)
        except PluginError as error:
            return [*rows, *(row("broken", "", name, error) for name in free)]
        said = set()
        for point in EXTENSION_POINTS:
            try:
                plugins = module.plugins(point)
            except PluginError as error:
                rows.append(row("broken", point, listed(free), error))
                said |= set(free)
                continue
            for plugin in plugins:
                said.add(plugin.name)
                if blocked(source, plugin.name):
                    continue
                state, reason = _state(source, plugin)
                met = tuple((text, unmet(text) is None) for text in plugin.requires)
                rows.append(row(state, point, plugin.name, reason, summary=plugin.summary, requires=met, plugin=plugin))
        watches = bool(module.manager.hook.observe.get_hookimpls())
        for name in sorted(set(free) - said):
            reason = f"{source.module} offers no plugin of this name"
            rows.append(row("ok", "observe", name) if watches else row("broken", "", name, reason))
        return rows

    def _module(self, source: PackageSource) -> _Module:
        """The imported module, once; its error is remembered, too."""
        if source not in self._loaded:
            try:
                self._loaded[source] = _Module(source)
            except PluginError as error:
                self._loaded[source] = error
        found = self._loaded[source]
        if isinstance(found, PluginError):
            raise found
        return found

    def _unknown(self, point: str, name: str) -> PluginError:
        rows = [row for row in self.listing() if row.point and row.plugin]
        here = sorted({row.name for row in rows if row.point == point})
        elsewhere = sorted({row.point for row in rows if row.name == name})
        near = did_you_mean(name, here)
        if elsewhere and not near:
            near = f" There is a plugin of this name for {listed(elsewhere)}."
        foreign = foreign_keys().get(name)
        if foreign is not None and foreign.here.startswith(f"{point}: "):
            near = f" Here it is {foreign.here}."
        leads = [source for source in self.sources if name in source.names and not elsewhere]
        if leads:
            near = f" {leads[0].label} has an entry point of this name, but {leads[0].module} offers no such plugin."
        return PluginError(
            f'{point}: no plugin "{name}" is installed.{near} Installed: {listed(here, 20) or "none"}. '
            "Install the package that offers it into this environment (llmtune's own: pip install ./plugins/*)"
        )


class _Module:
    """An imported plugin module, its hooks checked against the specifications."""

    def __init__(self, source: PackageSource) -> None:
        self.source = source
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(HOOKS)
        try:
            if source is CORE:
                loaded = import_module(source.module)
            else:
                loaded = EntryPoint(name="plugin", value=source.module, group=GROUP).load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{source.label} cannot be imported: {_sentence(error)}. Reinstall or update the package, or remove "
                "what the recipe names from it"
            ) from error
        try:
            self.manager.register(loaded)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"{source.label} does not keep to llmtune's hooks: {_sentence(error)}. "
                f"Hooks: {listed(EXTENSION_POINTS, 20)}, observe"
            ) from error
        self._plugins: dict[str, list[Plugin]] = {}

    def plugins(self, point: str) -> list[Plugin]:
        """What the module offers for an extension point. PluginError if the hook fails or returns something else."""
        if point not in self._plugins:
            self._plugins[point] = self._ask(point)
        return self._plugins[point]

    def _ask(self, point: str) -> list[Plugin]:
        label = self.source.label
        try:
            answers = getattr(self.manager.hook, point)()
        except Exception as error:
            raise PluginError(f"the hook {point} of {label} failed: {_sentence(error)}") from error
        found: list[Plugin] = []
        for answer in answers:
            if not isinstance(answer, (list, tuple)) or not all(isinstance(item, Plugin) for item in answer):
                kind = type(answer).__name__
                raise PluginError(f"the hook {point} of {label} returned {kind}, allowed is a list of llmtune.Plugin")
            found += answer
        for plugin in found:
            if not (isinstance(plugin.config, type) and dataclasses.is_dataclass(plugin.config)):
                raise PluginError(f"{point}: the config of {plugin.name} of {label} is not a dataclass")
        return found

    def observe(self, event: Event) -> None:
        """Hand an event to the module."""
        self.manager.hook.observe(event=event)


def check_plugin(offer: Offer) -> None:
    """PluginError unless the plugin is made for this llmtune and has what it needs."""
    if offer.plugin.api != API_VERSION:
        raise PluginError(
            f"{offer.label} is made for version {offer.plugin.api} of the plugin interface, this llmtune {__version__} "
            f"has {API_VERSION}; update {'llmtune' if offer.plugin.api > API_VERSION else offer.source.distribution}"
        )
    lacking = [(text, found) for text in offer.plugin.requires if (found := unmet(text))]
    if lacking:
        what = listed(f"{text} ({found})" for text, found in lacking)
        command = " ".join(f'"{text}"' for text, _ in lacking)
        raise PluginError(f"{offer.label} needs {what}; run: pip install {command}")


def _state(source: PackageSource, plugin: Plugin) -> tuple[str, str]:
    if plugin.name not in source.names:
        return "broken", f"{source.label} has no entry point of this name, so no recipe can find it"
    if plugin.api != API_VERSION:
        return "incompatible", f"made for version {plugin.api} of the plugin interface, this is {API_VERSION}"
    return "ok", ""


def _same_name(offers: Sequence[Offer]) -> None:
    if len(offers) > 1:
        packages = sorted({offer.source.label for offer in offers})
        fix = f"uninstall one, or name it in {BLOCK}" if len(packages) > 1 else "its module offers the name twice"
        raise PluginError(
            f'{offers[0].point}: "{offers[0].plugin.name}" is offered by {" and by ".join(packages)}; {fix}'
        )


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
