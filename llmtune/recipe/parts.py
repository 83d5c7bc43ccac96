"""From the names in a recipe to built plugin objects that fit together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import ErrorList, LlmtuneError, PlanError, PluginError, listed
from llmtune.contract.extension_points import EXTENSION_POINTS, default_plugins

if TYPE_CHECKING:
    from llmtune.contract.records import Plugin
    from llmtune.data.formats import Formats
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Part:
    """One plugin that a recipe uses."""

    point: str
    plugin: Plugin
    distribution: str
    version: str
    config: Any
    built: Any

    @property
    def label(self) -> str:
        return f"{self.point} {self.plugin.name}"

    @property
    def package(self) -> str:
        return f"{self.distribution} {self.version}"


class Parts:
    """All parts of a recipe, by extension point."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.all = tuple(parts)

    def at(self, point: str) -> list[Part]:
        return [part for part in self.all if part.point == point]

    def of(self, points: Sequence[str]) -> Parts:
        """The parts of some extension points."""
        return Parts([part for part in self.all if part.point in points])

    def one(self, point: str) -> Part:
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
def collect(problems: list[LlmtuneError]) -> Iterator[None]:
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
    """Resolve, decode and build every plugin the recipe names. What fails is added to `problems`."""
    from llmtune.recipe.recipe import decode_block

    defaults = default_plugins()
    found: list[Part] = []
    for point in points:
        blocks = recipe.blocks.get(point) or ([(defaults[point], {})] if point in defaults else [])
        for index, (name, _) in enumerate(blocks):
            with collect(problems):
                offer = registry.find(point, name)
                given = bool(recipe.blocks.get(point))
                config, wrong = (
                    decode_block(recipe, point, index, offer.plugin.config) if given else (offer.plugin.config(), [])
                )
                problems += wrong
                if config is None:
                    continue
                try:
                    built = offer.plugin.build(config)
                except LlmtuneError:
                    raise
                except Exception as error:
                    raise PluginError(
                        f"{point}: plugin {name} of {offer.distribution} {offer.version} failed to start: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                found.append(
                    Part(
                        point=point,
                        plugin=offer.plugin,
                        distribution=offer.distribution,
                        version=offer.version,
                        config=config,
                        built=built,
                    )
                )
    problems += clashes(found)
    return Parts(found)


def formats_of(parts: Parts, registry: Registry) -> Formats:
    """The formats that the recipe's data sets may have: those it names, and those that ship with llmtune."""
    from llmtune.data.formats.choose import Formats, detectable, facts_of
    from llmtune.recipe.builtin import data_config

    def find(name: str) -> tuple[Plugin, str]:
        offer = registry.find("data_config", name)
        return offer.plugin, f"{offer.distribution} {offer.version}"

    part = parts.one("data_config")
    return Formats(
        known=detectable(data_config()), find=find, default=part.built, default_name=part.plugin.name,
        default_config=part.config, default_facts=facts_of(part.config, part.package),
    )  # fmt: skip


def clashes(parts: Sequence[Part]) -> list[PlanError]:
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
