"""Lists of messages, whatever their keys and roles are called, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmtune.contract.errors import did_you_mean, listed
from llmtune.contract.examples import BadRow, Message
from llmtune.data.config import TEMPLATE_ARGUMENTS
from llmtune.data.messages import Content, content_of, kind, parse_calls, parse_thinking, text_of, tool_calls
from llmtune.data.misspelt import as_names, misspelt

FROM_VALUE = ("from", "value")
ROLE_CONTENT = ("role", "content")
_ROLES = {
    "system": "system", "developer": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "function_call": "call", "tool_call": "call", "observation": "tool", "tool": "tool",
    "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
_KEPT = ("name", "tool_call_id", "thinking")
_WEIGHTS = ("weight", "loss_weight", "loss_scale", "train", "loss")
"""What others call the weight of a message: OpenAI, LLaMA-Factory, ms-swift, Axolotl, ms-swift."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What others call what the model thinks before it answers: DeepSeek and Qwen, gpt-oss, vLLM."""
_OTHERS = (*FROM_VALUE, *ROLE_CONTENT, "tool_calls", "function_call", "name", "tool_call_id", *_REASONING, *_WEIGHTS)
"""Keys of messages that are read."""


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

    def __post_init__(self) -> None:
        keys = {"role_tag": self.role_tag, "content_tag": self.content_tag}
        roles = {name: value for name, value in vars(self).items() if name not in keys}
        for group in (keys, roles):
            given = [(name, value) for name, value in group.items() if value is not None]
            for at, (name, value) in enumerate(given):
                if same := [other for other, taken in given[:at] if taken == value]:
                    raise ValueError(f'{name}: found "{value}", which {same[0]} is too; allowed are different names')


@dataclass(frozen=True)
class Reader:
    """Reads messages under the names of a `TagsConfig`."""

    tags: TagsConfig = field(default_factory=TagsConfig)

    @cached_property
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
        messages: list[Message] = []
        for number, turn in enumerate(value, start=1):
            if not isinstance(turn, Mapping):
                raise BadRow("message is not an object", f"message {number} is {kind(turn)}, allowed is an object")
            keys = keys or self.keys(turn)
            role = self._role(turn, keys, number)
            message = self._message(turn, role, keys, number)
            if role == "call" and messages and _goes_on(messages[-1], message):
                messages[-1] |= {"tool_calls": [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]}
            else:
                messages.append(message)
        return messages

    def _message(self, turn: Mapping[str, Any], role: str, keys: tuple[str, str], number: int) -> Message:
        """One message."""
        role_key, content_key = keys
        if wrong := misspelt(as_names(turn), (*keys, *_OTHERS)):
            what = f'message {number} has the key "{wrong[0]}". Did you mean "{wrong[1]}"?'
            raise BadRow("misspelt key of a message", what)
        content = turn.get(content_key)
        said = Content("") if content is None else content_of(content, f"message {number}")
        calls = _calls(turn, said.calls, number)
        if content is None and not calls:
            what = f'no "{content_key}"' if content_key == "value" else f'neither "{content_key}" nor "tool_calls"'
            raise BadRow("null content", f"message {number} ({turn[role_key]}) has {what}, found {listed(turn)}")
        text = said.text
        if role == "call":
            thinking, text = parse_thinking(text)
            role, text, calls = "assistant", thinking, list(said.calls and calls) or parse_calls(text, number)
        if calls and role != "assistant":
            raise BadRow("tool calls outside assistant", f"message {number} ({role}) has tool_calls")
        message: Message = {"role": role, "content": text} | ({"tool_calls": calls} if calls else {})
        message |= {"media": said.media} if said.media else {}
        kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
        return message | _weight(turn, role, number) | _texts(kept, number) | _reasoning(turn, said, role, number)

    def _role(self, turn: Mapping[str, Any], keys: tuple[str, str], number: int) -> str:
        key = keys[0]
        if key not in turn:
            near = next((hint for name in turn if (hint := did_you_mean(str(name), [key]))), "")
            raise BadRow(f"message without {key}", f'message {number} has no "{key}", found {listed(turn)}.{near}')
        role, roles = turn[key], self.roles
        if role == "function" and "name" in turn and role not in roles:
            return "tool"  # what OpenAI called a tool's result at first
        if not isinstance(role, str) or role not in roles:
            near = did_you_mean(str(role), roles)
            what = f'message {number} has the role "{role}", allowed are {listed(roles, 16)}.{near}'
            raise BadRow("unknown role", what)
        return roles[role]


def _calls(turn: Mapping[str, Any], parts: Sequence[Any], number: int) -> list[dict[str, Any]]:
    """`tool_calls`, or the one `function_call` that OpenAI had before them, or the `parts` of the content."""
    given = {"tool_calls": turn.get("tool_calls"), "parts of type tool_call": list(parts)}
    if single := turn.get("function_call"):
        given["function_call"] = [single]
    filled = {name: calls for name, calls in given.items() if calls}
    if len(filled) > 1:
        raise BadRow("bad tool call", f"message {number} has {' and '.join(filled)}, allowed is one of them")
    return tool_calls(next(iter(filled.values())), number) if filled else []


def _goes_on(before: Message, call: Message) -> bool:
    """Whether a call that stands alone belongs to the message before it: one turn, with several calls at once."""
    bare = not call["content"] and call.keys() <= {"role", "content", "tool_calls", "weight"}
    return bare and before["role"] == "assistant" and before.get("weight") == call.get("weight")


def _texts(texts: Mapping[str, Any], number: int) -> dict[str, str]:
    for key, value in texts.items():
        if not isinstance(value, str):
            raise BadRow(f"{key} is not text", f'"{key}" of message {number} is {kind(value)}, allowed is text')
    return dict(texts)


def _reasoning(turn: Mapping[str, Any], said: Content, role: str, number: int) -> dict[str, str]:
    """What was thought, as `reasoning_content`, which most templates read."""
    thoughts = _texts({key: turn[key] for key in _REASONING if turn.get(key) is not None}, number)
    if said.reasoning:
        if role != "assistant":
            raise BadRow("reasoning outside assistant", f"message {number} ({role}) has parts of type reasoning")
        thoughts["parts of type reasoning"] = said.reasoning
    if len(set(thoughts.values())) > 1:
        raise BadRow(
            "several reasonings", f"message {number} has {listed(thoughts)} that differ, allowed is one of them"
        )
    return {"reasoning_content": next(iter(thoughts.values()))} if thoughts else {}


def _weight(turn: Mapping[str, Any], role: str, number: int) -> dict[str, float]:
    if turn.get("train_detail") is not None:
        raise BadRow("train_detail", f"message {number} has train_detail; parts of a message cannot be weighted")
    given = {key: turn[key] for key in _WEIGHTS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
            raise BadRow("bad weight", f'"{key}" of message {number} is {value!r}, allowed is a number >= 0')
        if role != "assistant" and value:
            raise BadRow("weight outside assistant", f'message {number} ({role}) has "{key}": {value!r}')
    values = {float(value) for value in given.values()}
    if len(values) > 1:
        raise BadRow("bad weight", f"message {number} has {listed(given)} that differ, allowed is one of them")
    return {"weight": values.pop()} if values - {1.0} and role == "assistant" else {}


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


def led(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` after the system message of the column `system`, which they may begin with themselves."""
    system = system_of(row)
    if not system or not messages or messages[0]["role"] != "system":
        return [*system, *messages]
    if system[0]["content"] != messages[0]["content"]:
        what = 'the column "system" and message 1 are system messages that differ, allowed is one of them'
        raise BadRow("two system messages", what)
    return messages


def asked_of(row: Mapping[str, Any]) -> list[Message]:
    """`instruction` and `input` as one user message, a line each."""

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise BadRow(f"{column} is not text", f'"{column}" is {kind(value)}, allowed is text')
        return value or ""

    joined = "\n".join(part for part in (text("instruction"), text("input")) if part)
    if not joined:
        raise BadRow("nothing asked", "instruction and input are empty, needed is text in one of them")
    return [{"role": "user", "content": joined}]


def variables_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own variables of the chat template."""
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise BadRow("bad chat_template_kwargs", f'"chat_template_kwargs" is {kind(variables)}, allowed is an object')
    if taken := sorted(set(variables) & TEMPLATE_ARGUMENTS):
        what = f'"chat_template_kwargs" sets {listed(taken)}, allowed are variables of the template'
        raise BadRow("bad chat_template_kwargs", what)
    thinking = row.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise BadRow("bad enable_thinking", f'"enable_thinking" is {kind(thinking)}, allowed is true or false')
    return dict(variables) | ({} if thinking is None else {"enable_thinking": thinking})


def held_in(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The first of `columns` that holds something, else the first that is there."""
    there = [column for column in columns if column in row]
    return next((column for column in there if row[column] is not None), there[0] if there else None)


def first_turn(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The first of `columns` that holds messages, and its first message."""
    for column in columns:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return column, turns[0]
    return "", {}
