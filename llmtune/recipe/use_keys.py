"""Other trainers' keys of a model that is only used (`llmtune chat FILE`, predict, export): taken under those names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.contract.extension_points import POINTS
from llmtune.recipe.blocks import as_block
from llmtune.recipe.foreign_keys import ForeignKey, asks_nothing, foreign_keys, is_done_anyway
from llmtune.recipe.places import Places


def own_keys(
    tree: Mapping[str, Any], changes: Mapping[str, Any], places: Places
) -> tuple[dict[str, Any], dict[str, Any], Places]:
    """A recipe's `tree` and the `changes` of its overrides with llmtune's keys for others' that have one, and without
    those that ask for nothing. What is left of others' keys is refused like any other.

    Raises RecipeError where a key is given under both names.
    """
    asked = {**tree, **changes}

    def sets(foreign: ForeignKey, value: Any) -> bool:
        other = asked.get(foreign.beside)
        alone = bool(foreign.beside) and (other is None or is_done_anyway(foreign_keys()[foreign.beside], other))
        return bool(foreign.use) and value is not None and not alone and not is_done_anyway(foreign, value)

    made, keys, overridden = {**tree}, {**places.keys}, {**places.overridden}
    besides: list[tuple[dict[str, Any], ForeignKey]] = []
    for name, foreign in _among(tree):
        value = made.pop(name)
        if not sets(foreign, value):
            continue
        point, _, key = foreign.use.partition(".")
        block = made.setdefault(point, {}) if point in POINTS else made
        if not isinstance(block, dict) or (key or point) in block:
            raise places.error(name, f"found beside {foreign.use}, which is the same; remove one of the two")
        besides.append((block, foreign))
        block[key or point] = value
        keys[(point, key) if key else (point,)] = keys.get((name,), (1, 1))
    for block, foreign in besides:  # last, as another key may say the same in its own words
        for also, its in foreign.also.items():
            block.setdefault(also.partition(".")[2], its)
    renamed: dict[str, Any] = {}
    for name, value in changes.items():
        foreign = dict(_among(changes)).get(name)
        if foreign is None:
            renamed[name] = value
        elif sets(foreign, value):
            point = foreign.use.partition(".")[0]
            renamed = renamed if point in made or point in renamed else {**foreign.also, **renamed}
            renamed[foreign.use] = value
            overridden[tuple(foreign.use.split("."))] = places.of(name)
    return {key: as_block(key, value) for key, value in made.items()}, renamed, Places(places.origin, keys, overridden)


def _among(given: Mapping[str, Any]) -> list[tuple[str, ForeignKey]]:
    """The keys of other trainers that are taken."""
    found = {name: foreign_keys()[name] for name in given if name in foreign_keys()}
    return [(name, foreign) for name, foreign in found.items() if foreign.use or asks_nothing(foreign, given[name])]
