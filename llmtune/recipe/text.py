"""The text of a recipe, YAML or JSON, as plain values with the place of every key. Knows nothing of their meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from llmtune.contract.errors import RecipeError, raise_all

MOST_BYTES = 256_000
"""Of a recipe's text. Real ones have 2 kB; PyYAML reads about 100 kB a second."""
MOST_NODES = 10_000
"""Values in a recipe, each alias counted as often as it is used."""
DEEPEST = 32

KeyPath = tuple[str | int, ...]
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """SafeLoader whose numbers are those people write: 1e-4 is one, 010, 12:30:45 and 2026-01-31 are text."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around whatever `_Loader` would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
}
_replaced = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _replaced]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _arguments = (f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))
    _Loader.add_implicit_resolver(*_arguments)
    _Dumper.add_implicit_resolver(*_arguments)


@dataclass
class RecipeText:
    """Plain values, and where they stand."""

    tree: Any
    places: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    """Key path to (line, column) of the key, from 1."""
    spans: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    """Key path to the characters [start, stop) of a scalar value."""
    text: str = ""
    problems: list[RecipeError] = field(default_factory=list)
    """What was refused, and left out of the tree."""


def parse(text: str, origin: str, *, as_json: bool = False) -> RecipeText:
    """Read the text of a recipe. Raises RecipeError with the place where the text cannot be read on; what can be
    left out is in `problems`."""
    if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise RecipeError(f"{origin}: longer than {MOST_BYTES:,} bytes; a recipe is a short file, is this another one?")
    if as_json:
        return _parse_json(text, origin)
    reader = _TreeReader(origin)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        cause = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise RecipeError(f"{place}  not valid YAML: {cause}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise RecipeError(f"{origin}: nested deeper than {DEEPEST} levels; recipes are flat") from None
    tree = reader.read(node, ()) if node is not None else None
    return RecipeText(tree, reader.places, reader.spans, text, reader.problems)


def parse_value(text: str, origin: str) -> Any:
    """The value of an override, read as in a file: `32`, `1e-4`, `null`, `[a, b]`, `{name: lora}`, or text."""
    found = parse(text, origin)
    raise_all(found.problems)
    return found.tree


def dump(tree: Mapping[str, Any]) -> str:
    """YAML that `parse` reads back to the same values."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _TreeReader:
    """Turns YAML nodes into plain values; collects what it refuses."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.problems: list[RecipeError] = []
        self.nodes = 0
        self.places: dict[KeyPath, tuple[int, int]] = {}
        self.spans: dict[KeyPath, tuple[int, int]] = {}
        self.loader = _Loader("")

    def refuse(self, node: yaml.Node, sentence: str) -> None:
        mark = node.start_mark
        self.problems.append(RecipeError(f"{self.origin}:{mark.line + 1}:{mark.column + 1}  {sentence}"))

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise RecipeError(
                f"{self.origin}: more than {MOST_NODES:,} values once aliases (*name) are written out; "
                "a recipe needs a hundred"
            )
        if len(path) > DEEPEST:
            raise RecipeError(f"{self.origin}: nested deeper than {DEEPEST} levels; recipes are flat")
        if node.tag not in _PLAIN:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.refuse(node, f"{show(path)}: the tag {tag} is not allowed; recipes are plain data and make no objects")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        self.spans[path] = (node.start_mark.index, node.end_mark.index)
        try:
            return self.loader.construct_object(node)
        except (ValueError, yaml.YAMLError):
            kind = node.tag.rpartition(":")[2]
            self.refuse(node, f'{show(path)}: found "{node.value}" tagged as {kind}, which it is not; remove the tag')
            return None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node, path)
            if key is None:
                continue
            here = (*path, key)
            if here in self.places:
                line = self.places[here][0]
                self.refuse(key_node, f"{show(here)}: given twice, first in line {line}; remove one of the two")
                continue
            self.places[here] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            before = len(self.problems)
            value = self.read(value_node, here)
            if len(self.problems) == before:
                made[key] = value
        return made

    def key(self, node: yaml.Node, path: KeyPath) -> str | None:
        if node.tag == "tag:yaml.org,2002:merge":
            self.refuse(node, "<<: merge keys are not read; write the keys out")
        elif not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
            self.refuse(node, f"{show(path)}: a key must be plain text")
        elif node.tag != "tag:yaml.org,2002:str":
            value = json.dumps(self.loader.construct_object(node), default=str)
            self.refuse(
                node,
                f"{show((*path, node.value))}: YAML reads this key as {value}, not as text; put it in quotes",
            )
        else:
            return str(node.value)
        return None


def _parse_json(text: str, origin: str) -> RecipeText:
    try:
        tree = json.loads(text) if text.strip() else None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{origin}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}") from error
    except RecursionError:
        raise RecipeError(f"{origin}: nested deeper than {DEEPEST} levels; recipes are flat") from None
    # JSON is YAML but for tabs, which stand between its values only.
    found = parse(text.replace("\t", " "), origin)
    return replace(found, tree=plain(tree, origin), text=text)


def plain(value: Any, origin: str, path: KeyPath = ()) -> Any:
    """A copy of a mapping's values made of dict, list, text, numbers, booleans and null only; RecipeError otherwise."""
    if len(path) > DEEPEST:
        raise RecipeError(f"{origin}: nested deeper than {DEEPEST} levels; recipes are flat")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{origin}: {show((*path, str(key)))}: the key {key!r} is not text; put it in quotes")
        return {key: plain(item, origin, (*path, key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item, origin, (*path, index)) for index, item in enumerate(value)]
    if hasattr(value, "__fspath__"):
        return str(value)
    fix = "; write the rows to a file (`to_parquet`, `save_to_disk`) and name it" if "dataset" in str(path[-1:]) else ""
    raise RecipeError(
        f"{origin}: {show(path)}: found a {type(value).__name__}; allowed are text, numbers, lists and mappings{fix}"
    )


def leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value in plain values that is neither a mapping nor a list, with its path."""
    if not isinstance(tree, (dict, list)):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, (*path, key))


def show(path: KeyPath) -> str:
    """`("kernel_config", 0, "name")` as `kernel_config[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the recipe"


def split(key: str) -> KeyPath:
    """The reverse of `show`; `kernel_config.0.name` means the same."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"[.\[\]]+", key) if part)
