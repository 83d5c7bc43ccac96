"""Keys in a recipe's YAML text, read and changed where they stand: comments and everything else stay as written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)$)[A-Za-z_][\w./@+-]*", re.I)
"""Text that YAML reads as text without quotes."""
_NOT_PRINTED = re.compile("[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML does not take as they are, or takes for the end of a line."""


class KeyAndValue(NamedTuple):
    """A key of a mapping, with its value."""

    key: yaml.Node
    value: yaml.Node


def quoted(text: str) -> str:
    """A text as a YAML value that is read back as this text."""
    if _PLAIN.fullmatch(text):
        return text
    return _NOT_PRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


class Values:
    """What a recipe's text says of its keys. Raises yaml.YAMLError where it is no YAML."""

    def __init__(self, text: str) -> None:
        self._text, self._root = text, _compose(text)

    def keys(self) -> list[str]:
        """The keys at the top."""
        return [key.value for key, _ in self._root.value] if isinstance(self._root, yaml.MappingNode) else []

    def at(self, *path: str) -> str | None:
        """A scalar's own characters, anything else as it is written, in one line; None where the key is absent."""
        entry = _entry(self._root, path)
        if entry is None:
            return None
        if isinstance(entry.value, yaml.ScalarNode):
            return entry.value.value
        written = self._text[entry.value.start_mark.index : _end(entry.value)]
        if _in_brackets(entry.value) and "\n" not in written:
            return written
        return json.dumps(_plain(entry.value), ensure_ascii=False)


def with_value(text: str, path: Sequence[str], value: str) -> str:
    """The text with `value`, which is YAML, for a key; a plugin's bare name becomes a block where a key goes into it.

    Raises yaml.YAMLError where the text is no YAML.
    """
    root = _compose(text)
    if (entry := _entry(root, path)) is not None:
        return text[: entry.key.end_mark.index] + f": {value}" + text[_end(entry.value) :]
    if len(path) == 1:
        if isinstance(root, yaml.MappingNode) and root.flow_style:
            return _into_flow(text, root, path[0], value)
        return f"{text.rstrip()}\n{path[0]}: {value}\n".lstrip("\n")
    block = _entry(root, path[:-1])
    if block is None or not isinstance(block.value, yaml.MappingNode):
        name = [] if block is None or block.value.tag.endswith("null") else [f"name: {text_of(text, block.value)}"]
        return with_value(text, path[:-1], f"{{{', '.join([*name, f'{path[-1]}: {value}'])}}}")
    if block.value.flow_style:
        return _into_flow(text, block.value, path[-1], value)
    first, stop = block.value.value[0][0], _line_end(text, _end(block.value))
    return text[:stop] + "\n" + " " * first.start_mark.column + f"{path[-1]}: {value}" + text[stop:]


def without(text: str, path: Sequence[str]) -> str:
    """The text without a key, and without the line that it stood on. Raises yaml.YAMLError where it is no YAML."""
    root = _compose(text)
    entry, around = _entry(root, path), _entry(root, path[:-1])
    if entry is None:
        return text
    parent = around.value if around is not None else root
    start, stop = entry.key.start_mark.index, _end(entry.value)
    if parent is not None and isinstance(parent, yaml.MappingNode) and parent.flow_style:
        comma_after = re.match(r"\s*,\s*", text[stop:])
        if comma_after:
            return text[:start] + text[stop + comma_after.end() :]
        return re.sub(r",\s*$", "", text[:start]) + text[stop:]
    if isinstance(parent, yaml.MappingNode) and len(parent.value) == 1 and len(path) > 1:
        return without(text, path[:-1])  # a block without keys would be null
    start = text.rfind("\n", 0, start) + 1
    return text[:start] + text[_line_end(text, stop) + 1 :]


def text_of(text: str, node: yaml.Node) -> str:
    """A node as it is written."""
    return text[node.start_mark.index : _end(node)]


def _in_brackets(node: yaml.Node) -> bool:
    """Whether a list or mapping is written in brackets."""
    return isinstance(node, yaml.CollectionNode) and bool(node.flow_style)


def _plain(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)


def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _entry(node: yaml.Node | None, path: Sequence[str]) -> KeyAndValue | None:
    found = None
    for name in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        found = next((KeyAndValue(key, value) for key, value in node.value if key.value == name), None)
        if found is None:
            return None
        node = found.value
    return found


def _end(node: yaml.Node) -> int:
    """Where a node's own text ends; a block's mark stands after the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return node.end_mark.index - 1 if node.end_mark.column == 0 else node.end_mark.index
    return node.end_mark.index


def _line_end(text: str, at: int) -> int:
    found = text.find("\n", at)
    return len(text) if found < 0 else found


def _into_flow(text: str, node: yaml.MappingNode, key: str, value: str) -> str:
    """`{name: lora}` becomes `{name: lora, r: 8}`."""
    stop = node.end_mark.index - 1
    inside = f"{', ' if node.value else ''}{key}: {value}"
    before = text[:stop].rstrip()
    return before.removesuffix(",") + inside + text[stop:]
