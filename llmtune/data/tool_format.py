"""How tools, calls and results are written for templates that know of none: `tool_format`."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, did_you_mean, listed
from llmtune.contract.examples import BadRow, Conversation, Message


def tool_format_names() -> list[str]:
    """Tool formats that ship with llmtune, by the name a recipe writes."""
    folder = resources.files("llmtune") / "data" / "tool_formats"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))


def read_tool_format(name: str | None, base_dir: Path) -> str | None:
    """The text of the format a recipe names. DataError if there is none."""
    if name is None:
        return None
    if name in tool_format_names():
        return (resources.files("llmtune") / "data" / "tool_formats" / f"{name}.jinja").read_text("utf-8")
    if not name.endswith((".jinja", ".jinja2", ".j2")):
        near, known = did_you_mean(name, tool_format_names()), listed(tool_format_names(), 12)
        raise DataError(f'tool_format: no format "{name}".{near} Known: {known}, or a path to a .jinja file')
    path = base_dir / Path(name).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tool_format: {path} cannot be read ({error}); check the path") from None


def with_tools_as_text(conversation: Conversation, text: str) -> Conversation:
    """The conversation with tools in its system message, calls in the assistant's text and results in user messages.

    `text` is a Jinja template that writes `part`: `tools` (of `tools`), `calls` (of `calls`: name, arguments) or
    `results` (of `results`, texts).
    """
    found: list[Message] = []
    for message in conversation.messages:
        if message["role"] == "tool":
            if found and found[-1].get("results"):
                found[-1]["results"].append(message["content"])
            else:
                found.append({"role": "user", "results": [message["content"]]})
        elif message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            written = _write(text, part="calls", calls=calls)
            content = f"{message['content']}\n{written}" if message["content"] else written
            found.append({**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content})
        else:
            found.append(message)
    found = [
        {"role": "user", "content": _write(text, part="results", results=each["results"])}
        if "results" in each
        else each
        for each in found
    ]
    if conversation.tools:
        told = _write(text, part="tools", tools=conversation.tools)
        if found[0]["role"] == "system":
            found[0] = {**found[0], "content": f"{found[0]['content']}\n\n{told}" if found[0]["content"] else told}
        else:
            found.insert(0, {"role": "system", "content": told})
    return replace(conversation, messages=found, tools=None)


def _write(text: str, **parts: Any) -> str:
    try:
        return _compiled(text).render(**parts)
    except Exception as error:  # a template raises whatever it likes
        raise BadRow("tool format refuses", f"the tool format raised {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # As in chat templates: without the escapes that HTML needs.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(text)
