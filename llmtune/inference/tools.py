"""Tools that a model is offered in a conversation, as it was trained to call them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError, RecipeError
from llmtune.contract.examples import BadRow, Message
from llmtune.data.messages import normal_tools
from llmtune.data.prompts import PromptWriter
from llmtune.data.tool_calls import CallFormat, call_format
from llmtune.inference.said import Channels

if TYPE_CHECKING:
    from llmtune.contract.generation import Asked


@dataclass
class OfferedTools:
    """Tools in a conversation: how they are written, and how calls of them are read."""

    tools: list[dict[str, Any]]
    writer: PromptWriter
    format: CallFormat | None
    """How calls stand in an answer; None where that is not known, so that they stay text."""
    kept: frozenset[int]

    @classmethod
    def of(cls, writer: PromptWriter, given: Any) -> OfferedTools:
        """Tools as a recipe's rows have them. Raises RecipeError where they are none, or the template writes none."""
        tools = read_tools(given)
        format = call_format(writer.renderer, writer.config.tool_format)
        offered = cls(tools, writer, format, format.tokens(writer.tokenizer) if format else frozenset())
        try:
            offered.prompt([{"role": "user", "content": "-"}])
        except DataError as error:
            raise RecipeError(f"tools: {error}") from error
        return offered

    def prompt(self, messages: list[Message]) -> Asked:
        """The prompt of a conversation. Raises DataError where the template cannot write it."""
        return self.writer.asked(messages, self.tools)

    def message(self, said: str, thinking: bool) -> Message:
        """An answer's text as a message, with thoughts and calls apart."""
        channels = Channels(self.format, thinking)
        told = {"thinking": "", "text": ""}
        for piece in channels.push(said, last=True):
            told[piece.kind] += piece.text
        message: Message = {"role": "assistant", "content": told["text"].strip()}
        if told["thinking"]:
            message["reasoning_content"] = told["thinking"].strip()
        if channels.calls:  # with numbers of nine characters, which are all that some templates take
            message["tool_calls"] = [
                {"id": f"call{number:05}", "type": "function", "function": call}
                for number, call in enumerate(channels.calls, start=1)
            ]
        return message


def read_tools(given: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape, from a list of functions or a JSON file of one. Raises RecipeError where it is none."""
    where = "tools"
    try:
        if isinstance(given, (str, Path)):
            where = f"tools: {given}"
            given = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
        tools = normal_tools(given)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: cannot be read ({error}); needed is a JSON list of functions") from None
    except BadRow as bad:
        raise RecipeError(f"{where}: {bad.detail}") from None
    if not tools:
        raise RecipeError(f"{where}: holds no functions; needed is a list of them, with name and parameters")
    return tools


def call_text(call: Mapping[str, Any]) -> str:
    """A call as people read it: `add {"a": 1}`."""
    function = call["function"]
    return f"{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}"
