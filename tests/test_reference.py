from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmtune.cli.commands import parser
from llmtune.cli.reference import write_commands
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.recipe.packages import PackageSource
from llmtune.recipe.reference import recipe_schema, write_reference
from llmtune.recipe.registry import Registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def first_party() -> Iterator[Registry]:
    """What this repository offers, whatever else is installed."""
    sources, folders = [], []
    for path in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        names: dict[str, list[str]] = {}
        for name, module in project["entry-points"].get("llmtune", {}).items():
            names.setdefault(module, []).append(name)
        sources += [
            PackageSource(module=module, distribution=project["name"], version=project["version"], names=tuple(several))
            for module, several in names.items()
        ]
        folders.append(str(path.parent))
    sys.path[:0] = folders
    yield Registry(sources)
    for folder in folders:
        sys.path.remove(folder)


def fits(schema: Mapping[str, Any], value: Any) -> bool:
    """The part of JSON Schema that recipes use, read independently of llmtune.contract.schema."""
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    if "const" in schema and not (value == schema["const"] and type(value) is type(schema["const"])):
        return False
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return False
    if kind := schema.get("type"):
        number = kind in ("integer", "number")
        if not isinstance(value, kinds[kind]) or (number and isinstance(value, bool)):
            return False
    bounds = {"minimum": lambda b: value >= b, "maximum": lambda b: value <= b}
    bounds |= {"exclusiveMinimum": lambda b: value > b, "exclusiveMaximum": lambda b: value < b}
    if not all(holds(schema[word]) for word, holds in bounds.items() if word in schema):
        return False
    if "anyOf" in schema and not any(fits(option, value) for option in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(option, value) for option in schema["oneOf"]) != 1:
        return False
    if "not" in schema and fits(schema["not"], value):
        return False
    if isinstance(value, dict) and "properties" in schema:
        if not set(schema.get("required", [])) <= set(value):
            return False
        if not schema["additionalProperties"] and not set(value) <= set(schema["properties"]):
            return False
        return all(fits(schema["properties"][key], item) for key, item in value.items() if key in schema["properties"])
    if isinstance(value, list) and "items" in schema:
        return all(fits(schema["items"], item) for item in value)
    return True


@pytest.mark.parametrize(
    ("more", "good"),
    [
        ({}, True),
        ({"peft_config": "lora"}, True),
        ({"peft_config": {"name": "lora", "r": 4}}, True),
        ({"peft_config": None, "kernel_config": False}, True),
        ({"kernel_config": ["auto"]}, True),
        ({"optim_config": {"weight_decay": 0.1}}, True),
        ({"learning_rate": 1e-4, "dataset": ["a", {"path": "b"}], "eval_strategy": False}, True),
        ({"peft_config": {"r": 4}}, False),
        ({"peft_config": {"name": "lora", "rnak": 4}}, False),
        ({"peft_config": {"name": "lora", "r": 0}}, False),
        ({"peft_config": ["lora"]}, False),
        ({"peft_config": "nobody"}, False),
        ({"learning_rate": 0}, False),
        ({"modle": "x"}, False),
        ({"packing": "yes"}, False),
    ],
)
def test_the_schema_takes_what_the_reader_takes(first_party: Registry, more: dict[str, Any], good: bool) -> None:
    schema = json.loads(json.dumps(recipe_schema(first_party)))
    assert fits(schema, {"model": "m"} | more) is good


def test_the_schema_has_every_point_and_a_sentence_for_every_key(first_party: Registry) -> None:
    schema = recipe_schema(first_party)
    assert set(EXTENSION_POINTS) <= set(schema["properties"])
    assert [key for key, part in schema["properties"].items() if not part.get("description")] == []
    assert schema["required"] == ["model"]
    for point in EXTENSION_POINTS:
        for form in schema["properties"][point]["anyOf"][0]["oneOf"]:
            keys = form.get("properties", {})
            assert [key for key, part in keys.items() if key != "name" and not part.get("description")] == []


def test_a_point_without_plugins_takes_none_only() -> None:
    schema = recipe_schema(Registry([]))
    assert fits(schema, {"model": "m", "peft_config": None})
    assert not fits(schema, {"model": "m", "peft_config": "lora"})


def test_the_reference_in_the_docs_is_current(first_party: Registry) -> None:
    path = ROOT / "docs" / "recipe.md"
    assert path.read_text(encoding="utf-8") == write_reference(first_party), (
        "run: python -m llmtune.recipe.reference > docs/recipe.md"
    )


def test_the_schema_in_the_docs_is_current(first_party: Registry) -> None:
    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    assert written == json.loads(json.dumps(recipe_schema(first_party))), (
        "run: llmtune schema > docs/recipe.schema.json"
    )


def test_the_reference_names_every_key_and_plugin(first_party: Registry) -> None:
    text = write_reference(first_party)
    for key in recipe_schema(first_party)["properties"]:
        assert f"`{key}`" in text or f"### {key}\n" in text
    for row in first_party.listing():
        assert row.state == "ok", row
        assert f"#### `{row.point}: {row.name}`" in text


def test_the_reference_of_commands_is_current_and_whole() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == write_commands(), "run: python -m llmtune.cli.reference > docs/commands.md"
    assert "\n### `llmtune data check`\n" in page and "\n| `--nproc N` | ranks on this machine" in page
    listed = re.findall(r"^    (\w+)  ", parser(["train"]).format_help(), re.M)
    assert len(listed) > 9 and [name for name in listed if f"\n## `llmtune {name}`\n" not in page] == []
