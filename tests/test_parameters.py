"""Each of the 188 keys of the official table is a key, is converted, or is answered, and never with a wrong name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune.contract.errors import LlmtuneError
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.schema import field_types
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.parameters import official_keys
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from tests.test_reference import first_party

__all__ = ["first_party"]

ROOT = Path(__file__).parents[1]
REFUSED = {"trust_remote_code": True, "use_reentrant_gc": True}
"""Values of keys that are taken, and where these are not: the reason is in their rows."""


def test_the_table_is_the_official_one() -> None:
    text = (ROOT / "tests" / "documented_keys.txt").read_text(encoding="utf-8").partition("# 003 Environment")[0]
    assert list(official_keys()) == [line for line in text.splitlines() if not line.startswith("#")]
    assert len(official_keys()) == 188


def values(name: str) -> Iterator[Any]:
    """The default of a key there, and what its type there allows, as far as that is written out."""
    key = official_keys()[name]
    yield key.default
    yield from re.findall(r'"(\w+)"', key.type)
    if key.type in ("bool", "Optional[bool]"):
        yield from (True, False)
    if key.type.startswith("Optional"):
        yield None


@pytest.mark.parametrize("name", official_keys())
def test_each_key_is_taken_or_answered(name: str) -> None:
    if name in top_level_keys():
        assert name not in foreign_keys()
        for value in values(name):
            if REFUSED.get(name) != value or value is not True:
                load_recipe({"model": "m", name: value})
        return
    foreign = foreign_keys()[name]
    with pytest.raises(LlmtuneError) as caught:
        load_recipe({"model": "m", name: official_keys()[name].default})
    assert str(caught.value) == f"recipe  {name}: no such key{foreign.answer}"
    assert foreign.here or len(foreign.reason.split()) > 3


@pytest.fixture(scope="module")
def plugins(first_party: Registry) -> dict[str, dict[str, set[str]]]:
    """The keys of every plugin, by extension point and name."""
    found: dict[str, dict[str, set[str]]] = {point: {} for point in EXTENSION_POINTS}
    for row in first_party.listing():
        if row.plugin is not None:
            found[row.point][row.name] = set(field_types(row.plugin.config))
    return found


def test_answers_name_what_there_is(plugins: dict[str, dict[str, set[str]]]) -> None:
    """Every plugin, and every key in a block, that an answer names is one of these plugins."""
    for name, foreign in foreign_keys().items():
        told = foreign.here or foreign.reason
        for point, key in re.findall(r"\b(\w+_config)\.(\w+)", told):
            assert any(key in keys for keys in plugins[point].values()), f"{name}: {point}.{key}"
        for point, plugin, key in re.findall(r"(\w+_config): {name: (\w+)(?:, (\w+):)?", told):
            assert plugin in plugins[point], f"{name}: {point}: {plugin}"
            assert not key or key in plugins[point][plugin], f"{name}: {point}: {plugin}: {key}"
        for point, plugin in re.findall(r"(\w+_config): (\w+)", told):
            assert plugin in plugins[point] or plugin == "null", f"{name}: {point}: {plugin}"
        plain = re.match(r"(\w+)$", foreign.here)
        assert not plain or plain[1] in top_level_keys(), f"{name}: {foreign.here}"


@pytest.mark.parametrize("name", [name for name, foreign in foreign_keys().items() if foreign.use])
def test_a_key_that_is_converted_means_what_it_says(name: str) -> None:
    foreign = foreign_keys()[name]
    chosen = {
        "quantization_bit": 4,
        "bnb_4bit_quant_type": "nf4",
        "quantization_type": "fp4",
        "quantization_method": "hqq",
        "infer_backend": "vllm",
    }
    value = False if "double" in name else chosen.get(name, "some/model")
    base = {} if foreign.use == "model" else {"model": "m"}
    beside = {foreign.beside: chosen[foreign.beside]} if foreign.beside else {}
    file, words = {**base, **beside, name: value}, {**beside, name: value}
    for made in (load_recipe(file, for_use=True), load_recipe({"model": "m"}, words, for_use=True)):
        point, _, key = foreign.use.partition(".")
        if key == "name":
            assert made.blocks[point] == [(value, beside)]
        elif key:
            assert made.blocks[point] == [(foreign.also[f"{point}.name"], {key: value})]
        else:
            assert getattr(made.model, foreign.use) == value
