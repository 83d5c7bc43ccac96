"""The blocks of extension points: a plugin's name and its parameters, read from what a recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmtune.contract.errors import PluginError, RecipeError, did_you_mean, listed
from llmtune.contract.extension_points import POINTS
from llmtune.contract.schema import decode, field_types
from llmtune.recipe.keys import about_unknown_in_block
from llmtune.recipe.places import Places
from llmtune.recipe.registry import Offer, Registry

SEVERAL = tuple(name for name, point in POINTS.items() if point.several)
"""Extension points that take a list of blocks."""

Blocks = Mapping[str, list[tuple[str, dict[str, Any]]]]


def as_block(key: str, value: Any) -> Any:
    """A bare plugin name as a block, so that overrides can add parameters to it; false as null."""
    if key not in POINTS:
        return value
    if value is False:
        return None
    if isinstance(value, list) and key in SEVERAL:
        return [as_block(key, item) for item in value]
    return {"name": value} if isinstance(value, str) and "${" not in value else value


def read_blocks(tree: Mapping[str, Any], places: Places) -> tuple[Blocks, list[RecipeError]]:
    """The blocks of every extension point that `tree` has, and what is wrong with their shape.

    A point whose default has to give way to null has an empty list.
    """
    problems: list[RecipeError] = []
    found = {}
    for name, point in POINTS.items():
        blocks = _read(name, as_block(name, tree.get(name)), places, problems)
        if blocks or (name in tree and point.default is not None and not point.required):
            found[name] = blocks
    return found, problems


def _read(point: str, value: Any, places: Places, problems: list[RecipeError]) -> list[tuple[str, dict[str, Any]]]:
    entries = value if isinstance(value, list) else [] if value is None else [value]
    made = []
    if isinstance(value, list) and point not in SEVERAL:
        problems.append(places.error(point, f"found a list, allowed is one plugin; lists go with {listed(SEVERAL)}"))
        return []
    for index, entry in enumerate(entries):
        at = place_in(point, index, len(entries))
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            problems.append(
                places.error(at, f"found {entry!r}, allowed is a plugin's name or {{name: ..., parameters}}")
            )
            continue
        if "name" not in entry and (slip := next((key for key in entry if did_you_mean(key, ["name"])), None)):
            problems.append(places.error(f"{at}.{slip}", 'no such key. Did you mean "name"?'))
            entry = {"name": entry[slip], **{key: value for key, value in entry.items() if key != slip}}
        name = entry.get("name", POINTS[point].default)
        if not isinstance(name, str) or not name:
            found = "no name" if "name" not in entry else f"the name {entry['name']!r}"
            problems.append(
                places.error(at, f"found {found}; say which plugin the block is for, as in {point}: {{name: ...}}")
            )
            continue
        if name.lower() == "none":
            problems.append(places.error(at, f'found "{name}"; for no plugin, write {point}: null'))
            continue
        if not POINTS[point].repeats and any(name == other for other, _ in made):
            problems.append(places.error(at, f'names "{name}" twice, allowed is once; remove one'))
            continue
        made.append((name, {key: item for key, item in entry.items() if key != "name"}))
    return made


def place_in(point: str, index: int, count: int) -> str:
    """The path of a block: `peft_config`, or `kernel_config[1]` where there are several."""
    return f"{point}[{index}]" if count > 1 else point


def decode_block(blocks: Blocks, places: Places, point: str, index: int, config: type) -> tuple[Any, list[RecipeError]]:
    """The parameters of one block as its plugin's dataclass, or None with everything that is wrong with them."""
    name, parameters = blocks[point][index]
    at = place_in(point, index, len(blocks[point]))
    made, wrong = decode(config, parameters, at, partial(about_unknown_in_block, point, name))
    problems = []
    for problem in wrong:
        key, _, rest = problem.message.partition(": ")
        if problem.key == at and key in field_types(config):  # a check of the dataclass itself names its key in front
            problems.append(places.error(f"{at}.{key}", rest))
        else:
            problems += places.errors(problem.key, problem.message)
    return made, problems


def find_named(registry: Registry, places: Places, point: str, index: int, blocks: Blocks) -> Offer:
    """The plugin that a block names. Raises PluginError with the place of the block."""
    name, at = blocks[point][index][0], place_in(point, index, len(blocks[point]))
    try:
        return registry.find(point, name)
    except PluginError as error:
        raise PluginError(f"{places.of(at)}  {error}") from error


def wrong_blocks(blocks: Blocks, places: Places, registry: Registry) -> list[RecipeError | PluginError]:
    """All that is wrong with plugins' names and keys, for a recipe that is not read on for other mistakes."""
    problems: list[RecipeError | PluginError] = []
    for point, several in blocks.items():
        for index in range(len(several)):
            try:
                offer = find_named(registry, places, point, index, blocks)
                problems += decode_block(blocks, places, point, index, offer.plugin.config)[1]
            except PluginError as error:
                problems.append(error)
    return problems
