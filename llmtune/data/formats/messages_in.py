"""Lists of messages, whatever their keys and roles are called, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtune.data.messages import kind, parse_calls, text_of, tool_calls
from llmtune.errors import did_you_mean, listed
from llmtune.examples import BadRow, Message

FROM_VALUE = ("from", "value")
ROLE_CONTENT = ("role", "content")
_ROLES = {
    "system": "system", "developer": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "function_call": "call", "observation": "tool", "tool": "tool",
}  # fmt: skip
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
_WEIGHTS = ("weight", "loss_scale", "train", "loss")
"""What others call the weight of a message: OpenAI, ms-swift, Axolotl, ms-swift."""


@dataclass(frozen=True, kw_only=True)
class TagsConfig:
    """Keys and roles of messages where they are called otherwise than usual; null keeps the usual ones."""

    role_tag: str | None = None
    """Key of a message's role; else `from` or `role`, whichever the first message has."""
    content_tag: str | None = None
    """Key of a message's text; else `value` or `content`."""
    user_tag: str | None = None
    """The user's role; else `human` or `user`."""
    assistant_tag: str | None = None
    """The model's role; else `gpt` or `assistant`."""
    observation_tag: str | None = None
    """Role of a tool's result; else `observation` or `tool`."""
    function_tag: str | None = None
    """Role of a message whose text is a tool call; else `function_call`."""
    system_tag: str | None = None
    """Role of the system message; else `system` or `developer`."""


@dataclass(frozen=True)
class Reader:
    """Reads messages under the names of a `TagsConfig`."""

    tags: TagsConfig = field(default_factory=TagsConfig)

    @property
    def roles(self) -> dict[str, str]:
        """Role as it is written: role as it is meant."""
        own = {
            self.tags.user_tag: "user", self.tags.assistant_tag: "assistant", self.tags.observation_tag: "tool",
            self.tags.function_tag: "call", self.tags.system_tag: "system",
        }  # fmt: skip
        given = {name: role for name, role in own.items() if name is not None}
        return {name: role for name, role in _ROLES.items() if role not in given.values()} | given

    def keys(self, turn: Mapping[str, Any]) -> tuple[str, str]:
        """(role, content) keys of a message."""
        usual = FROM_VALUE if "from" in turn and "role" not in turn else ROLE_CONTENT
        return self.tags.role_tag or usual[0], self.tags.content_tag or usual[1]

    def messages(self, value: Any, column: str) -> list[Message]:
        """`value` as messages; BadRow with what is wrong."""
        if not isinstance(value, list):
            raise BadRow(f"{column} is not a list", f'"{column}" is {kind(value)}, allowed is a list of messages')
        keys: tuple[str, str] | None = None
        found: list[Message] = []
        for number, turn in enumerate(value, start=1):
            if not isinstance(turn, Mapping):
                raise BadRow("message is not an object", f"message {number} is {kind(turn)}, allowed is an object")
            keys = keys or self.keys(turn)
            found.append(self.message(turn, keys, number))
        return found

    def message(self, turn: Mapping[str, Any], keys: tuple[str, str], number: int) -> Message:
        """One message."""
        role_key, content_key = keys
        role = self._role(turn, role_key, number)
        content, calls = turn.get(content_key), turn.get("tool_calls")
        if content is None and not calls:
            what = f'no "{content_key}"' if content_key == "value" else f'neither "{content_key}" nor "tool_calls"'
            raise BadRow("null content", f"message {number} ({turn[role_key]}) has {what}, found {listed(turn)}")
        text = "" if content is None else text_of(content, f"message {number}")
        message: Message = {"role": role, "content": text}
        if role == "call":
            message = {"role": "assistant", "content": "", "tool_calls": parse_calls(text, number)}
        elif calls:
            if role != "assistant":
                raise BadRow("tool calls outside assistant", f"message {number} ({role}) has tool_calls")
            message["tool_calls"] = tool_calls(calls, number)
        return message | _weight(turn, message["role"], number) | {k: turn[k] for k in _KEPT if turn.get(k) is not None}

    def _role(self, turn: Mapping[str, Any], key: str, number: int) -> str:
        if key not in turn:
            near = next((hint for name in turn if (hint := did_you_mean(str(name), [key]))), "")
            raise BadRow(f"message without {key}", f'message {number} has no "{key}", found {listed(turn)}.{near}')
        role, roles = turn[key], self.roles
        if role not in roles:
            near = did_you_mean(str(role), roles)
            what = f'message {number} has the role "{role}", allowed are {listed(roles, 12)}.{near}'
            raise BadRow("unknown role", what)
        return roles[role]


def _weight(turn: Mapping[str, Any], role: str, number: int) -> dict[str, float]:
    for key in _WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
            raise BadRow("bad weight", f'"{key}" of message {number} is {value!r}, allowed is a number >= 0')
        if role != "assistant":
            if value:
                raise BadRow("weight outside assistant", f'message {number} ({role}) has "{key}": {value!r}')
            return {}
        return {} if value == 1 else {"weight": float(value)}
    return {}


def system_of(row: Mapping[str, Any]) -> list[Message]:
    """The column `system` as the first message, if it holds one."""
    return [{"role": "system", "content": text_of(row["system"], 'the column "system"')}] if row.get("system") else []


def history_of(row: Mapping[str, Any]) -> list[Message]:
    """The column `history`: pairs of user and assistant texts."""
    history, messages = row.get("history") or [], []
    if not isinstance(history, list):
        raise BadRow("history is not a list", f'"history" is {kind(history)}, allowed is a list of [user, assistant]')
    for number, pair in enumerate(history, start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("bad history", f"entry {number} of history is not a pair of texts [user, assistant]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def asked_of(row: Mapping[str, Any]) -> list[Message]:
    """`instruction` and `input` as one user message, a line each."""

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise BadRow(f"{column} is not text", f'"{column}" is {kind(value)}, allowed is text')
        return value or ""

    joined = "\n".join(part for part in (text("instruction"), text("input")) if part)
    return [{"role": "user", "content": joined}]


def variables_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own variables of the chat template."""
    found = row.get("chat_template_kwargs") or {}
    if not isinstance(found, Mapping):
        raise BadRow("bad chat_template_kwargs", f'"chat_template_kwargs" is {kind(found)}, allowed is an object')
    thinking = row.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise BadRow("bad enable_thinking", f'"enable_thinking" is {kind(thinking)}, allowed is true or false')
    return dict(found) | ({} if thinking is None else {"enable_thinking": thinking})


def first_turn(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The first of `columns` that holds messages, and its first message."""
    for column in columns:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return column, turns[0]
    return "", {}
