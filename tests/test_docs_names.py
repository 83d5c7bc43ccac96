"""Names in the pages for users are names of today: files, classes and their attributes, keys of recipes, commands."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import llmtune
from llmtune.cli.commands import parser
from llmtune.cli.plugin_commands import GROUP
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.schema import field_types
from llmtune.data.config import Source
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.registry import Registry

ROOT = Path(__file__).parents[1]
FOLDERS = ("*.md", "docs/**/*.md", "notebooks/*.md", "plugins/*/README.md")
PAGES = [page for pattern in FOLDERS for page in ROOT.glob(pattern)]
OTHERS = {"hpz_partition_size", "lr_end", "report_to"}
"""Keys of DeepSpeed and of transformers that the pages compare with."""
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_of(page: Path) -> list[str]:
    """What stands between backticks in running text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pages
def test_files_exist(page: Path) -> None:
    folders = "llmtune|tests|recipes|plugins|benchmarks|docs"
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/.*-]+\.(?:py|md|yaml|json)\b", text))
    assert [name for name in sorted(named) if not any(ROOT.glob(name))] == []


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pages
def test_functions_are_where_a_page_says(page: Path) -> None:
    """`name` in `llmtune/file.py`."""
    claims = re.findall(r"`([\w.]+)`\s+in\s+`(llmtune/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert len(claims) > 10 or page.name != "tour.md"
    for name, file in claims:
        last = name.rpartition(".")[2]
        assert re.search(rf"^\s*((def|class) {last}\b|{last} = )", (ROOT / file).read_text("utf-8"), re.M), (name, file)


@cache
def attributes() -> dict[str, set[str]]:
    """Names that the classes of the core and of the plugins have, those of their bases among them."""
    own: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in [*(ROOT / "llmtune").rglob("*.py"), *(ROOT / "plugins").glob("*/llmtune_*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own[node.name] = set(_members(node))
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return {name: names.union(*(own.get(base, set()) for base in bases[name])) for name, names in own.items()}


def _members(node: ast.ClassDef) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            yield part.name
        elif isinstance(part, ast.AnnAssign):
            yield ast.unparse(part.target).removeprefix("self.")
        elif isinstance(part, ast.Assign):
            yield from (ast.unparse(target).removeprefix("self.") for target in part.targets)


@pages
def test_classes_have_the_attributes_that_are_named(page: Path) -> None:
    claims = [re.match(r"([A-Z]\w+)\.(\w+)", word) for word in code_of(page)]
    known = [(claim[1], claim[2]) for claim in claims if claim and claim[1] in attributes()]
    assert [f"{name}.{attribute}" for name, attribute in known if attribute not in attributes()[name]] == []


@pages
def test_names_of_llmtune_are_there(page: Path) -> None:
    names = {found[1] for word in code_of(page) if (found := re.match(r"llmtune\.([A-Za-z]\w*)", word))}
    inside = {path.stem for path in (ROOT / "llmtune").iterdir()}
    assert [name for name in sorted(names) if name not in inside and not hasattr(llmtune, name)] == []


@cache
def keys_of_blocks() -> dict[str, set[str]]:
    """The keys of every installed plugin, by extension point."""
    found: dict[str, set[str]] = {point: {"name"} for point in EXTENSION_POINTS}
    for row in Registry().listing():
        if row.plugin is not None:
            found[row.point] |= set(field_types(row.plugin.config))
    return found


@pages
def test_keys_are_keys_of_recipes(page: Path) -> None:
    """`key: value`, and `block.key`, as a recipe has them."""
    blocks = keys_of_blocks()
    known = {*OTHERS, *top_level_keys(), *field_types(Source), *field_types(llmtune.GenerateConfig)}.union(
        *blocks.values()
    )
    if page.name == "migration.md":
        known |= set(foreign_keys())
    written = [found[1] for word in code_of(page) if (found := re.match(r"([a-z]\w+_\w+): ", word))]
    dotted = [found for word in code_of(page) if (found := re.match(r"(\w+_config)\.(?!json)(\w+)$", word))]
    assert [key for key in written if key not in known] == []
    assert [claim[0] for claim in dotted if claim[2] not in blocks.get(claim[1], ())] == []


@cache
def options_and_keys() -> tuple[Mapping[str, set[str]], set[str]]:
    """The options of every command, those of packages among them, and the keys that may follow one."""
    options, keys = dict(options_of(parser())), {*top_level_keys(), *field_types(llmtune.GenerateConfig)}
    for entry in entry_points(group=GROUP):
        options[entry.name] = {"--help"}
        keys |= field_types(entry.load()).keys()
    return options, keys


def options_of(command: argparse.ArgumentParser) -> Mapping[str, set[str]]:
    """The options of every command and of every command below it, by the command's name."""
    found: dict[str, set[str]] = {}
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                inner = options_of(below)
                found[name] = {text for each in below._actions for text in each.option_strings}.union(*inner.values())
    return found


@pages
def test_commands_have_the_options_and_keys_that_are_written(page: Path) -> None:
    options, keys = options_and_keys()
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in [*(line for block in blocks for line in block.splitlines()), *code_of(page)]:
        if command := re.match(r"llmtune ([a-z]+)\b", line):
            assert command[1] in options, line
            # What stands in quotation marks is a value: a whole command line, for `llmtune convert`.
            bare = re.sub(r'"[^"]*"', "", line.partition("  #")[0])
            assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", bare)) <= options[command[1]], line
            assert set(re.findall(r"[\s\"]([a-z]\w*)[.\w]*=", line)) <= {*keys, "key"}, line
