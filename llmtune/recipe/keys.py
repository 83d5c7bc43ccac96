"""The keys of a recipe: which dataclasses own them, and what is said of a key that is none."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from llmtune.contract.errors import RecipeError, did_you_mean, listed
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.generation import GenerationKeys
from llmtune.contract.schema import field_types
from llmtune.data.config import DataConfig
from llmtune.model.source import ModelConfig
from llmtune.recipe.export_config import ExportConfig
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.train_config import TrainConfig

CONFIGS: tuple[type, ...] = (ModelConfig, DataConfig, TrainConfig, GenerationKeys, ExportConfig)
"""The dataclasses that own the keys at the top level."""


def top_level_keys() -> list[str]:
    """Every key at the top level of a recipe, extension points last."""
    return [*(key for config in CONFIGS for key in field_types(config)), *EXTENSION_POINTS]


def require_no_slip(keys: Iterable[str], names: Collection[str], where: str = "") -> None:
    """Raise RecipeError for the first of `keys` that is no recipe's and is nearly one of `names`, which a command takes
    besides."""
    for key in keys:
        if key.partition(".")[0] not in top_level_keys() and (near := did_you_mean(key, names)):
            raise RecipeError(f"{where}{key}: no such key.{near}")


def about_unknown(key: str) -> str:
    """The sentence about a key at the top level that llmtune does not have."""
    if key in foreign_keys():
        return f"no such key{foreign_keys()[key].answer}"
    if key.endswith("_config"):
        near = did_you_mean(key, EXTENSION_POINTS)
        return f"no such extension point.{near} Known: {listed(EXTENSION_POINTS, 20)}"
    return f"no such key.{did_you_mean(key, top_level_keys()) or ' `llmtune schema` lists all keys'}"


def about_unknown_in_block(point: str, name: str, key: str, known: Collection[str]) -> str:
    """The sentence about a key that the plugin `name` does not have: a lookalike, or where the key belongs."""
    near = did_you_mean(key, known)
    end = f"{near} Known: {listed(sorted(known), 40)}" if known else " It has no keys"
    if not near and key in top_level_keys():
        return f'no such key for "{name}": it is a key of the recipe itself; write it outside of the block.{end}'
    foreign = foreign_keys().get(key)
    if foreign is None or near:
        return f'no such key for "{name}".{end}'
    own = foreign.here.partition(" ")[0].removeprefix(f"{point}.").rstrip(":,")
    if foreign.here.startswith(f"{point}.") and own in known:
        return f'no such key for "{name}" (write {own}).{end}'
    return f'no such key for "{name}"{foreign.answer}.{end}'
