"""The parts of a conversation, brought to one shape and checked, whatever format they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmtune.contract.errors import listed
from llmtune.contract.examples import BadRow
from llmtune.media.marks import MARKS, check_unmarked, joined_parts

_KINDS = {
    type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list",
    dict: "an object",
}  # fmt: skip


ROLES = ("system", "user", "assistant", "tool")
"""What a message's role may be once it is read."""


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _KINDS.get(type(value), type(value).__name__)


class Content(NamedTuple):
    """What the `content` of a message says."""

    text: str
    reasoning: str = ""
    calls: tuple[Any, ...] = ()
    """Tool calls as they are written: objects, or their JSON text."""
    media: tuple[Any, ...] = ()
    """For each mark in the text what says which file it means; None where a column of the row does."""


_PARTS = ("reasoning", "text", "tool_call")
"""Types of the parts of a content, in the order in which templates write them."""
_MEDIA = {
    "image": "image", "image_url": "image", "video": "video", "video_url": "video", "audio": "audio",
    "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
"""Types of parts that show something, and what: transformers' and OpenAI's names. They may stand amid text."""

_ASKED_OF_ONE = (
    "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "fps", "nframes", "num_frames",
    "min_frames", "max_frames", "video_start", "video_end",
)  # fmt: skip
"""What parts may ask of a processor elsewhere (qwen-vl-utils), and one recipe says here for all rows."""


def content_of(value: Any, place: str) -> Content:
    """Text, or a list of parts. Parts of one type are joined with nothing between, as transformers' own templates do;
    beside media they can still be told apart.

    Raises:
        BadRow: `value` is neither, a part is of another type, or the parts stand in an order that no template writes.
    """
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list) or not all(isinstance(part, Mapping) and "type" in part for part in value):
        raise BadRow("content is not text", f"{place} is {kind(value)}, allowed is text")
    if other := sorted({str(part["type"]) for part in value} - set(_PARTS) - set(_MEDIA)):
        allowed = listed((*_PARTS, *_MEDIA))
        raise BadRow("unknown part", f"{place} holds parts of type {listed(other)}, allowed are {allowed}")
    shown = tuple(
        _source(part, _MEDIA[part["type"]], f"part {at} of {place}")
        for at, part in enumerate(value, start=1)
        if part["type"] in _MEDIA
    )
    parts = [
        ("text", MARKS[_MEDIA[part["type"]]])
        if part["type"] in _MEDIA
        else (part["type"], _said(part, f"part {at} of {place}"))
        for at, part in enumerate(value, start=1)
    ]
    order = [name for name, said in parts if not isinstance(said, str) or said.strip()]
    if order != sorted(order, key=_PARTS.index):
        what = f"{place} has parts in the order {listed(order)}, allowed is {listed(_PARTS)}"
        raise BadRow("parts out of order", what)
    found = {name: [said for own, said in parts if own == name] for name in _PARTS}
    text = joined_parts(found["text"]) if shown else "".join(found["text"])
    return Content(text, "".join(found["reasoning"]), tuple(found["tool_call"]), shown)


def _source(part: Mapping[str, Any], shows: str, place: str) -> Any:
    """What says which file a part means: `image: path`, `url`, `path`, `image_url: {url}`, `input_audio: {data}`."""
    if asked := [name for name in _ASKED_OF_ONE if part.get(name) is not None]:
        fix = "remove it: image_max_pixels, video_fps and the like say it for all rows, and a part of a video is a file"
        raise BadRow("unknown key of a part", f"{place} asks for {listed(asked)}, which rows cannot; {fix}")
    value = next((part[key] for key in (part["type"], shows, "url", "path", "base64") if part.get(key)), None)
    if isinstance(value, Mapping) and part["type"] == "input_audio" and isinstance(value.get("data"), str):
        return f"data:audio/{value.get('format', 'wav')};base64,{value['data']}"
    return url_of_source(part, place) if value is None and part.get("source") else value


def url_of_source(part: Mapping[str, Any], place: str) -> str:
    """The URL of a part in Anthropic's shape: its `source` is `{type: base64, media_type: ..., data: ...}`, or `{type:
    url, url: ...}`. BadRow for any other."""
    source = part["source"]
    if isinstance(source, Mapping) and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type')};base64,{source['data']}"
    if isinstance(source, Mapping) and isinstance(source.get("url"), str):
        return source["url"]
    found = f"of type {source.get('type')}" if isinstance(source, Mapping) else f"that is {kind(source)}"
    wanted = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    raise BadRow("unknown source", f"{place} has a source {found}, allowed are base64 and url; or write {wanted}")


def _said(part: Mapping[str, Any], place: str) -> Any:
    """What one part says, under whichever key it does."""
    keys = (part["type"], "value", "content")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if not isinstance(value, str) and not (part["type"] == "tool_call" and isinstance(value, Mapping)):
        what = f"{place} ({part['type']}) says {kind(value)}; needed is text under one of {listed(keys)}"
        raise BadRow("content is not text", what)
    if isinstance(value, str):
        check_unmarked(value, place)
    return value


def text_of(value: Any, place: str) -> str:
    """Text, or the joined text parts of a content that has no other parts."""
    found = content_of(value, place)
    if found.reasoning or found.calls or found.media:
        raise BadRow("not only text", f"{place} holds parts of reasoning, tool calls or media, allowed is text")
    return found.text


def _parsed(value: str, what: str, reason: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(reason, f"{what} is not JSON ({error}): {value[:60]!r}") from None


def normal_tools(value: Any) -> list[dict[str, Any]] | None:
    """`tools` as a list in OpenAI's shape, from that, from bare function objects, or from JSON text of either."""
    if isinstance(value, str):
        value = _parsed(value, '"tools"', "bad tools") if value.strip() else None
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow("bad tools", f'"tools" is {kind(value)}, allowed is a list of functions')
    tools = []
    for number, tool in enumerate(value, start=1):
        tool = _parsed(tool, f"tool {number}", "bad tools") if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("bad tools", f"tool {number} has no function name, needed are name and parameters")
        tools.append({"type": "function", "function": dict(function)})
    return tools


def _call(call: Any, place: str) -> dict[str, Any]:
    call = _parsed(call, place, "bad tool call") if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("bad tool call", f"{place} has no function name, allowed is {{name, arguments}}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"arguments of {place}", "bad tool call") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadRow("bad tool call", f"arguments of {place} are {kind(arguments)}, allowed is an object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    # Most templates write arguments as JSON themselves; given JSON text they would quote it a second time.
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls` of message `number`, or their JSON text, with arguments as objects."""
    if isinstance(calls, str):
        calls = _parsed(calls, f"tool_calls of message {number}", "bad tool call")
    if not isinstance(calls, list):
        raise BadRow("bad tool call", f"tool_calls of message {number} is {kind(calls)}, allowed is a list")
    return [_call(call, f"tool call {at} of message {number}") for at, call in enumerate(calls, start=1)]


def parse_thinking(value: str) -> tuple[str, str]:
    """What is thought inline before a call, with its marks, and the rest."""
    head, mark, rest = value.partition("</think>")
    return (head + mark, rest) if mark and head.lstrip().startswith("<think>") else ("", value)


def parse_calls(value: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT's `function_call` text: one `{name, arguments}` or a list of them."""
    calls = _parsed(value, f"the function call in message {number}", "bad tool call")
    return tool_calls(calls if isinstance(calls, list) else [calls], number)


def check_conversation(messages: Sequence[Mapping[str, Any]], answered: bool = True) -> None:
    """BadRow unless the roles follow each other and, where it should be `answered`, there is something to learn."""
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            what = f"message {number} has the keys {listed(message)}, needed are a role ({listed(ROLES)}) and text"
            raise BadRow("bad message", what)
    roles = [message["role"] for message in messages]
    if answered and "assistant" not in roles:
        raise BadRow("no assistant turn", f"found {listed(roles) or 'no messages'}, needed is one by the assistant")
    if answered and all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise BadRow("nothing to learn", "every message by the assistant has the weight 0")
    for number, message in enumerate(messages, start=1):
        role, before = message["role"], messages[number - 2]["role"] if number > 1 else None
        if role == "system" and before is not None:
            raise BadRow("roles out of order", f"message {number} is a system message, which can only come first")
        if role == "tool" and before not in ("assistant", "tool"):
            found = f"message {number} is a tool result after {before or 'nothing'}"
            raise BadRow("roles out of order", f"{found}, allowed is after an assistant message")
        if role == "assistant" and not message["content"] and not message.get("tool_calls"):
            raise BadRow("empty answer", f"message {number} (assistant) is empty; the model would learn to say nothing")
