"""From the names in a recipe to built plugin objects that fit together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.environment import named_plugins
from llmtune.contract.errors import ErrorList, LlmtuneError, PlanError, PluginError, blaming, listed, raise_all
from llmtune.contract.extension_points import EXTENSION_POINTS, POINTS, ExtensionPoint
from llmtune.contract.rewards import numbered
from llmtune.contract.stages import learns_of
from llmtune.data.formats.builtin import FORMATS
from llmtune.data.formats.choose import Formats, detectable, facts_of
from llmtune.recipe.blocks import decode_block, find_named
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from llmtune.contract.hubs import Hub
    from llmtune.contract.launching import Launcher
    from llmtune.contract.records import Plugin
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Offer


@dataclass(frozen=True, kw_only=True)
class BuiltPlugin:
    """One plugin that a recipe uses."""

    point: str
    plugin: Plugin
    package: str
    """With its version."""
    full_label: str
    """Extension point, plugin and package, for errors that a plugin is to blame for."""
    config: Any
    built: Any

    @property
    def label(self) -> str:
        return f"{self.point} {self.plugin.name}"


def reward_names(rewards: Sequence[BuiltPlugin]) -> list[str]:
    """What the rewards of a recipe are called in metrics, in its order: by the key `label` of their blocks, else by
    their plugin."""
    return numbered([getattr(part.config, "label", None) or part.plugin.name for part in rewards])


class Parts:
    """All parts of a recipe, by extension point."""

    def __init__(self, parts: Sequence[BuiltPlugin], notes: Sequence[str] = ()) -> None:
        self.all = tuple(parts)
        self.notes = tuple(notes)
        """What a plan has to say of plugins that would be there by default."""

    def at(self, point: str) -> list[BuiltPlugin]:
        return [part for part in self.all if part.point == point]

    def of(self, points: Sequence[str]) -> Parts:
        """The parts of some extension points."""
        return Parts([part for part in self.all if part.point in points])

    def one(self, point: str) -> BuiltPlugin:
        """The part of a point that must have exactly one."""
        return self.at(point)[0]

    @property
    def capabilities(self) -> frozenset[str]:
        """Capability words that the parts give together."""
        return frozenset(word for part in self.all for word in part.plugin.gives)

    def fingerprint(self) -> dict[str, str]:
        """Name to package and version, for the run's records and for ranks to compare."""
        return {part.label: part.package for part in self.all}


@contextmanager
def collect(problems: list[Any]) -> Iterator[None]:
    """Note an error of llmtune instead of raising it, so that several can be shown at once."""
    try:
        yield
    except ErrorList as several:
        problems += several.errors
    except LlmtuneError as error:
        problems.append(error)


def find_parts(
    recipe: Recipe, registry: Registry, problems: list[LlmtuneError], points: Sequence[str] = EXTENSION_POINTS
) -> Parts:
    """Resolve, decode, build and check every plugin the recipe names. What fails is added to `problems`."""
    found: list[BuiltPlugin] = []
    notes: list[str] = []
    for point in points:
        if point not in recipe.blocks:
            with collect(problems if POINTS[point].required else notes):
                found += _default_part(POINTS[point], registry)
            continue
        for index in range(len(recipe.blocks[point])):
            with collect(problems):
                offer = find_named(registry, recipe.places, point, index, recipe.blocks)
                config, wrong = decode_block(recipe.blocks, recipe.places, point, index, offer.plugin.config)
                problems += wrong
                if config is not None:
                    found.append(_build(offer, config))
    problems += clashes(found)
    return Parts(found, [f"{note}. Until then the recipe does without" for note in notes])


def _default_part(point: ExtensionPoint, registry: Registry) -> list[BuiltPlugin]:
    """The plugin of a point that the recipe leaves out, if the point has one then."""
    if point.default is None:
        return []
    try:
        offer = registry.find(point.name, point.default)
        return [_build(offer, offer.plugin.config())]
    except PluginError as error:
        if point.name not in named_plugins():
            raise
        raise PluginError(f"{error}; {named_plugins()[point.name][1]} is set and names it") from error


def _build(offer: Offer, config: Any) -> BuiltPlugin:
    """PluginError where `build` raises, or returns what does not keep to the protocol of its extension point."""
    with blaming(offer.label, "build"):
        built = offer.plugin.build(config)
    if objection := POINTS[offer.point].objection(built):
        raise PluginError(f"{offer.label}: what it builds, {type(built).__name__}, {objection}")
    return BuiltPlugin(
        point=offer.point, plugin=offer.plugin, package=offer.source.label, full_label=offer.label, config=config,
        built=built,
    )  # fmt: skip


def formats_of(parts: Parts | None, registry: Registry) -> Formats:
    """The formats that data sets may have: those that ship with llmtune, and any that a recipe or an entry of
    `dataset` names. Without `parts` each data set's format is detected."""

    def find(name: str) -> tuple[Plugin, str]:
        offer = registry.find("data_config", name)
        return offer.plugin, offer.source.label

    def stages(kind: str) -> list[str]:
        rows = [row for row in registry.listing() if row.point == "stage_config" and row.state == "ok"]
        return [row.name for row in rows if row.plugin and kind in _learns(row.plugin)]

    known = detectable(FORMATS)
    if parts is None:
        return Formats(known=known, find=find, stages=stages)
    part = parts.one("data_config")
    return Formats(
        known=known, find=find, default=part.built, default_name=part.plugin.name,
        default_config=part.config, default_facts=facts_of(part.config, part.package), stages=stages,
    )  # fmt: skip


def _learns(stage: Plugin) -> Sequence[str]:
    """The kinds of examples that a stage learns from; nothing is known of one that needs parameters."""
    try:
        return learns_of(stage.build(stage.config()))
    except Exception:
        return ()


def known_formats(recipe: Recipe | None = None) -> Formats:
    """The formats of this installation; the one that `recipe` names is the default. Raises the errors of its block."""
    registry = Registry()
    if recipe is None:
        return formats_of(None, registry)
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, ("data_config",))
    raise_all(problems)
    return formats_of(parts, registry)


def formats_to_read(recipe: Recipe) -> Formats:
    """The same where rows are not trained on, so that no other stage would take them."""
    return replace(known_formats(recipe), stages=lambda kind: ())


def launcher_of(recipe: Recipe, registry: Registry) -> Launcher:
    """What starts the processes of a run of `recipe`. Raises the errors of its block."""
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, ("launch_config",))
    raise_all(problems)
    return parts.one("launch_config").built


def hub_of(recipe: Recipe) -> Hub:
    """Where the models, adapters and data sets of `recipe` come from. Raises the errors of its block."""
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, Registry(), problems, ("hub_config",))
    raise_all(problems)
    return parts.one("hub_config").built


def clashes(parts: Sequence[BuiltPlugin]) -> list[PlanError]:
    """Capability words that are needed and not given, or given and refused; one sentence naming both sides."""
    problems = []
    for part in parts:
        others = [other for other in parts if other is not part]
        given = {word: other for other in others for word in other.plugin.gives}
        for word in sorted(part.plugin.refuses & set(given)):
            problems.append(
                PlanError(
                    f"{part.point}: {part.plugin.name} cannot be used with {given[word].label}, "
                    f"because it refuses what that gives ({word.replace('_', ' ')}); remove one of the two"
                )
            )
        if lacking := sorted(part.plugin.needs - set(given)):
            problems.append(
                PlanError(
                    f"{part.point}: {part.plugin.name} needs {listed(word.replace('_', ' ') for word in lacking)}, "
                    "which no other part of the recipe gives; see `llmtune plugins`"
                )
            )
    return problems
