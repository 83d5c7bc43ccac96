"""Calls of tools are found in what a model said: the way back of the tool formats, and of templates that know tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError
from llmtune.contract.examples import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.data.render import Renderer

Call = dict[str, Any]
"""A call: `name` and `arguments`, an object."""


@dataclass(frozen=True)
class CallFormat:
    """How calls stand in an answer."""

    mark: str
    """What a call begins with; nothing where only the whole answer tells."""
    read: Callable[[str], list[Call] | None]
    """The calls in a text that begins with the mark; None where it holds none, or is no such text to its end."""

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The control token that is the mark, where the tokenizer has one: text without control tokens needs it."""
        return frozenset(at for at, token in tokenizer.added_tokens_decoder.items() if str(token) == self.mark)

    def parse(self, text: str) -> tuple[str, list[Call]]:
        """What is said before the calls, and the calls; all of the text and none where it has no calls."""
        at = text.find(self.mark)
        calls = self.read(text[at:].strip()) if at >= 0 else None
        return (text[:at].strip(), calls) if calls else (text, [])


def _objects(text: str, between: str) -> list[Any] | None:
    """JSON values with nothing but `between`, a pattern, before and after each."""
    found, decoder, gap = [], json.JSONDecoder(), re.compile(between)
    while (at := gap.match(text).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, size = decoder.raw_decode(text[at:])
        except ValueError:
            return None
        found.append(value)
        text = text[at + size :]
    return found


def _calls(values: Any) -> list[Call] | None:
    """Objects with a name and its arguments as calls."""
    found = []
    for value in values or ():
        value = value.get("function", value) if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            (arguments,) = _objects(arguments, r"\s*") or [None]
        if not isinstance(arguments, Mapping):
            return None
        found.append({"name": value["name"], "arguments": dict(arguments)})
    return found


def _hermes(text: str) -> list[Call] | None:
    return _calls(_objects(text, r"(?:\s|</?tool_call>)*"))


def _mistral(text: str) -> list[Call] | None:
    said = text.removeprefix("[TOOL_CALLS]")
    if named := re.findall(r"([\w.-]+)\[ARGS\](.*?)(?=\[TOOL_CALLS\]|\Z)", said, re.DOTALL):  # newer tokenizers
        return _calls([{"name": name, "arguments": arguments} for name, arguments in named])
    values = _objects(said, r"\s*")
    return _calls(values[0] if values and isinstance(values[0], list) else values)


def _llama3(text: str) -> list[Call] | None:
    values = _objects(text.removeprefix("<|python_tag|>"), r"[\s;]*")
    named = [value for value in values or () if isinstance(value, Mapping) and {"parameters", "arguments"} & set(value)]
    return _calls(values) if values and len(named) == len(values) else None


def _lines(text: str, pattern: str) -> list[Call] | None:
    """Calls that `pattern` splits into names and texts of their arguments."""
    first, *parts = re.split(pattern, text, flags=re.MULTILINE)
    if first.strip() or not parts:
        return None
    return _calls([{"name": name, "arguments": told} for name, told in zip(parts[::2], parts[1::2], strict=True)])


def _default(text: str) -> list[Call] | None:
    return _lines(text, r"^Action: (.+?)\s*\nAction Input:")


def _glm4(text: str) -> list[Call] | None:
    return _lines(text, r"^([\w.-]+)[ \t]*\n(?=\{)")


CALL_FORMATS: Mapping[str, CallFormat] = {
    "hermes": CallFormat("<tool_call>", _hermes),
    "mistral": CallFormat("[TOOL_CALLS]", _mistral),
    "default": CallFormat("Action:", _default),
    "llama3": CallFormat("", _llama3),
    "glm4": CallFormat("", _glm4),
}
"""By the name of the tool format that writes them."""

_TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
_CALL = {"name": "add", "arguments": {"a": 1, "b": "two"}}


def call_format(renderer: Renderer, tool_format: str | None) -> CallFormat | None:
    """How the calls of a model stand in its answers: as the named tool format has them, else as its template writes
    them; None where neither is known."""
    if tool_format is not None:
        return CALL_FORMATS.get(tool_format)
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "a12345678"}]}
    answer["tool_calls"][0]["function"] = _CALL  # type: ignore[index]
    asked = Conversation(
        messages=[{"role": "user", "content": "a"}, answer], tools=[{"type": "function", "function": _TOOL}]
    )
    try:
        written = renderer.answer(asked)
    except (LlmtuneError, ValueError):
        return None  # the template knows no tools
    marks = {each.mark for each in CALL_FORMATS.values()}
    special = {str(token) for token in renderer.tokenizer.added_tokens_decoder.values() if token.special}
    for token in special - marks:
        written = written.replace(token, "")
    return next((each for each in CALL_FORMATS.values() if each.parse(written)[1] == [_CALL]), None)
