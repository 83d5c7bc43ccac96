"""Conversations: Alpaca, ShareGPT, OpenAI messages, prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.contract.examples import BadRow, Conversation, Message
from llmtune.data.formats.messages_in import (
    Reader,
    TagsConfig,
    asked_of,
    first_turn,
    held_in,
    history_of,
    led,
    system_of,
    variables_of,
)
from llmtune.data.messages import kind, normal_tools

VARIABLES = ("enable_thinking", "chat_template_kwargs")
HELD = ("messages", "conversations", "conversation")
"""Columns of messages with role and content."""
PAIRED = ("chosen", "rejected", "chosen_messages", "rejected_response", "rejected_messages", "kto_tag")
"""Columns of rows that hold more than a conversation."""
_YES_OR_NO = ("true", "false", "yes", "no", "0", "1")


def is_more(row: Mapping[str, Any]) -> bool:
    """Whether the row is a preference or a labelled answer."""
    return any(column in row for column in PAIRED) or is_label(row.get("label"))


def is_label(value: Any) -> bool:
    """Whether a label says yes or no, rightly spelt or not: read as a class, unwanted answers would be learnt."""
    return str(value).strip().lower() in _YES_OR_NO if isinstance(value, bool | int | str) else False


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The column `tools`, or `functions`, as OpenAI called it at first."""
    return normal_tools(row.get("tools") or row.get("functions"))


@dataclass(frozen=True, kw_only=True)
class AlpacaConfig:
    """Rows of instruction, input and output."""


class Alpaca:
    """`instruction` and `input`, a line each, are asked; `output` is the answer; `history` comes before."""

    kind = "conversation"
    columns = ("instruction", "input", "output", "system", "history", "tools", *VARIABLES)
    required = ("instruction", "output")

    def __init__(self, config: AlpacaConfig | None = None) -> None:
        self.config = config or AlpacaConfig()

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return "instruction and output" if {"instruction", "output"} <= set(row) and not is_more(row) else None

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        answer = row["output"]
        if answer is None:
            raise BadRow("null content", '"output" is null, allowed is text')
        if not isinstance(answer, str):
            raise BadRow("output is not text", f'"output" is {kind(answer)}, allowed is text')
        messages = [*system_of(row), *history_of(row), *asked_of(row), {"role": "assistant", "content": answer}]
        return Conversation(messages=messages, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row))


class ShareGpt:
    """`conversations` of messages with `from` and `value`, or `role` and `content`; also ms-swift's `conversation` of
    pairs `{human, assistant}`."""

    kind = "conversation"
    columns = ("conversations", "conversation", "system", "tools", *VARIABLES)
    required = ()
    needs = "conversations of from and value"

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.reader = Reader(config or TagsConfig())

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        column, turn = first_turn(row, ("conversations", "conversation"))
        if is_more(row):
            return None
        keys = self.reader.keys(turn)
        if set(keys) <= set(turn) and column == "conversations" and keys[0] != "role":
            return f"conversations with {'/'.join(keys)}"
        return "conversation with human/assistant" if {"human", "assistant"} <= set(turn) else None

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        column = held_in(row, HELD[1:])
        if column is None:
            raise BadRow("no conversations", f'sharegpt needs the column "conversations", found {", ".join(row)}')
        messages = led(row, self.reader.messages(_as_turns(row[column]), column))
        return Conversation(messages=messages, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row))


def _as_turns(value: Any) -> Any:
    """Pairs `{human, assistant}` as messages; anything else as it is."""
    if not (isinstance(value, list) and value and all(isinstance(t, Mapping) and "human" in t for t in value)):
        return value
    return [
        {"role": role, "content": turn.get(key)}
        for turn in value
        for key, role in (("human", "user"), ("assistant", "assistant"))
    ]


class OpenAi:
    """`messages` with `role` and `content`, tool calls, reasoning and weights."""

    kind = "conversation"
    columns = (*HELD, "system", "tools", "functions", *VARIABLES)
    required = ()
    needs = "messages of role and content"

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.reader = Reader(config or TagsConfig())

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        column, turn = first_turn(row, HELD)
        keys = self.reader.keys(turn)
        if keys[0] not in turn or is_more(row) or (column != "messages" and keys[0] != "role"):
            return None
        return f"{column} with {'/'.join(keys)}"

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        column = held_in(row, HELD)
        if column is None:
            raise BadRow("no messages", f'openai needs the column "messages", found {", ".join(row)}')
        messages = led(row, self.reader.messages(row[column], column))
        return Conversation(messages=messages, tools=tools_of(row), template_kwargs=variables_of(row))


class PromptCompletion:
    """`prompt` and `completion`, texts or messages, as TRL has them. Only the completion is learnt."""

    kind = "conversation"
    columns = ("prompt", "completion", "system", "tools", *VARIABLES)
    required = ("prompt", "completion")

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.reader = Reader(config or TagsConfig())

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return "prompt and completion" if {"prompt", "completion"} <= set(row) and not is_more(row) else None

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        messages = led(row, [*self.prompt(row), *self.answer(row["completion"], "completion")])
        return Conversation(messages=messages, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row))

    def prompt(self, row: Mapping[str, Any]) -> list[Message]:
        """The prompt as messages; earlier answers in it are not learnt."""
        messages = self.turns(row["prompt"], "prompt", "user")
        return [{**each, "weight": 0.0} if each["role"] == "assistant" else each for each in messages]

    def answer(self, value: Any, column: str) -> list[Message]:
        """An answer as messages, the first of them the assistant's."""
        return self.turns(value, column, "assistant")

    def turns(self, value: Any, column: str, role: str) -> list[Message]:
        """Text as one message of `role`; a message or a list of messages as they are."""
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        if value is None:
            raise BadRow("null content", f'"{column}" is null, allowed is text or messages')
        if not isinstance(value, (Mapping, list)):
            raise BadRow(f"{column} is no answer", f'"{column}" is {kind(value)}, allowed is text, a message or a list')
        return self.reader.messages([value] if isinstance(value, Mapping) else value, column)
