"""Tables of the pages that repeat what the code says: defaults, names, codes, types."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtune.cli.commands import parser
from llmtune.contract import errors
from llmtune.contract.schema import field_types
from llmtune.data.formats.builtin import FORMATS
from llmtune.data.template import template_names
from llmtune.distributed.config import Fsdp2Config
from llmtune.distributed.stopping import EXIT_INTERRUPTED
from llmtune.model.precision import choose_precision
from llmtune.recipe.registry import Registry

ROOT = Path(__file__).parents[1]
PLUGINS = [row.plugin for row in Registry().listing() if row.plugin is not None]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Every table of a page, a row as column to cell."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|\n"))] for line in lines.splitlines()]
        yield [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def named(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def table(text: str, column: str) -> list[dict[str, str]]:
    """The one table that has this column."""
    (found,) = [rows for rows in tables(text) if column in rows[0]]
    return found


@pytest.mark.parametrize("readme", (ROOT / "plugins").glob("*/README.md"), ids=lambda path: path.parent.name)
def test_defaults_of_a_plugins_page(readme: Path) -> None:
    for rows in tables(readme.read_text(encoding="utf-8")):
        for row in rows if {"key", "default"} <= rows[0].keys() else ():
            for key in named(row["key"]):
                said = yaml.safe_load(row["default"].strip("`"))
                found = [list(value) if isinstance(value, tuple) else value for value in defaults(readme.parent, key)]
                assert any(said in (value, *(value if isinstance(value, list) else ())) for value in found), row


def defaults(package: Path, key: str) -> list[Any]:
    """What the plugins of a package have for a key that is left out."""
    modules = {path.name for path in package.glob("llmtune_*")}
    own = [plugin.config for plugin in PLUGINS if plugin.config.__module__.partition(".")[0] in modules]
    found = [item for config in own for item in fields(config) if item.name == key]
    made = [item.default if item.default_factory is MISSING else item.default_factory() for item in found]
    return [None if value is MISSING else value for value in made]


def test_the_readme_explains_the_lines_of_a_recipe() -> None:
    recipe = page("recipes/qlora.yaml").splitlines()
    lines = [named(row["line"])[0] for row in table(page("README.md"), "line")]
    wanted = [line for line in recipe if line and not line.startswith("#")]
    assert len(lines) == len(wanted)
    for line, own in zip(lines, wanted, strict=True):
        assert own.startswith(line.partition("...")[0]), (line, own)


def test_the_readme_lists_every_command() -> None:
    (commands,) = [rows for rows in tables(page("README.md")) if "command" in rows[0]]
    said = {named(row["command"])[0].split()[1] for row in commands}
    assert said == set(re.findall(r"^    (\w+) ", parser().format_help(), re.M))


def test_exit_codes() -> None:
    said = {row["code"]: row["meaning"] for row in table(page("docs/checkpoints.md"), "code")}
    own = {
        str(each.exit_code) for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")
    }
    assert set(said) == own | {"0", "130", str(EXIT_INTERRUPTED)}


def test_formats_and_templates() -> None:
    data = page("docs/data.md")
    formats = [named(row["format"])[0] for row in table(data, "format")]
    assert sorted([*formats, "auto"]) == sorted(plugin.name for plugin in FORMATS)
    templates = {name for row in table(data, "template") for name in named(re.sub(r"\(.*?\)", "", row["template"]))}
    assert templates == set(template_names())


def test_keys_of_spreading() -> None:
    keys = [named(row["key"])[0] for row in table(page("docs/distribution.md"), "key")]
    assert sorted(keys) == sorted(field_types(Fsdp2Config))


@pytest.mark.parametrize(
    "row", table(page("docs/numerics.md"), "activations, frozen weights"), ids=lambda row: row["recipe"]
)
def test_number_types(row: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = yaml.safe_load("\n".join(named(row["recipe"]))) or {}
    device = torch.device("cpu" if row["recipe"].endswith("CPU") else "cuda")
    fast = "bfloat16" if "bfloat16" in row["activations, frozen weights"] else "float32"
    monkeypatch.setenv("LLMTUNE_CPU_DTYPE", fast)
    found = choose_precision(
        device, keys.get("bf16"), keys.get("fp16"), keys.get("pure_bf16", False), Any,
        capable="other GPU" not in row["recipe"],
    )  # fmt: skip
    assert str(found.compute).removeprefix("torch.") in row["activations, frozen weights"]
    assert str(found.trainable).removeprefix("torch.") == row["trainable weights, optimiser state"]
    assert found.autocast == ("autocast" in row["how"]) and found.scaled == ("loss scaling" in row["how"])
