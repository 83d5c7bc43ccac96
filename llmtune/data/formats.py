"""Rows of known formats become conversations in OpenAI's shape. A new format is one more entry in `FORMATS`.

Every format says how it is recognised, so that what was detected can be explained, and checks its own fields, so that
a row which does not fit is named with the reason instead of being guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llmtune.data.messages import BadRow, check_conversation, kind, normal_tools, parse_calls, text_of, tool_calls
from llmtune.errors import DataError, did_you_mean, listed
from llmtune.examples import Conversation, Message

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One shape of rows."""

    name: str
    columns: tuple[str, ...]
    """Every column it reads, for `did you mean`."""
    required: tuple[str, ...]
    recognise: Callable[[Mapping[str, Any]], str | None]
    """What makes a row look like this format, in words; None if it does not."""
    convert: Callable[[Mapping[str, Any]], Conversation]
    """BadRow if the row does not fit."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that a column goes by."""

    def read(self, row: Any) -> Conversation:
        """The row as a checked conversation; BadRow with a reason to count by and the detail."""
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"the row is {kind(row)}, allowed is an object with {listed(self.required)}")
        if media := [name for name in _MEDIA if row.get(name)]:
            raise BadRow("not only text", f'the column "{media[0]}" holds media, allowed is text only')
        row = {self.aliases.get(name, name) if name not in self.columns else name: row[name] for name in row}
        self._check_columns(row)
        conversation = self.convert(row)
        check_conversation(conversation.messages)
        return conversation

    def _check_columns(self, row: Mapping[str, Any]) -> None:
        absent = [name for name in self.columns if name not in row]
        for column in row:
            # 0.8 is one or two letters: other columns ("text", "id", "category") are nobody's misspelling.
            if column not in self.columns and (near := get_close_matches(str(column), absent, n=1, cutoff=0.8)):
                raise BadRow("misspelt column", f'{self.name} has no column "{column}". Did you mean "{near[0]}"?')
        if missing := [name for name in self.required if name not in row]:
            found = listed(row) or "no columns"
            raise BadRow(f"no {missing[0]}", f'{self.name} needs the column "{missing[0]}", found {found}')


def _list_of_messages(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRow(f"{column} is not a list", f'"{column}" is {kind(turns)}, allowed is a list of messages')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow("message is not an object", f"message {number} is {kind(turn)}, allowed is an object")
    return turns


def _first_turn(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    turns = row.get(column)
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) else {}


def _role(turn: Mapping[str, Any], key: str, roles: Mapping[str, str], number: int) -> str:
    if key not in turn:
        near = next((hint for name in turn if (hint := did_you_mean(str(name), [key]))), "")
        raise BadRow(f"message without {key}", f'message {number} has no "{key}", found {listed(turn)}.{near}')
    role = turn[key]
    if role not in roles:
        near = did_you_mean(str(role), roles)
        raise BadRow("unknown role", f'message {number} has the role "{role}", allowed are {listed(roles, 12)}.{near}')
    return roles[role]


def _system(row: Mapping[str, Any]) -> list[Message]:
    """The column `system` as the first message, if it holds one."""
    return [{"role": "system", "content": text_of(row["system"], 'the column "system"')}] if row.get("system") else []


# Alpaca: instruction, input, output


def _is_alpaca(row: Mapping[str, Any]) -> str | None:
    return "instruction and output" if {"instruction", "output"} <= set(row) else None


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise BadRow(f"{column} is not text", f'"{column}" is {kind(value)}, allowed is text')
        return value or ""

    if row["output"] is None:
        raise BadRow("null content", '"output" is null, allowed is text')
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow("history is not a list", f'"history" is {kind(history)}, allowed is a list of [user, assistant]')
    for number, pair in enumerate(history, start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRow("bad history", f"entry {number} of history is not a pair of texts [user, assistant]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(part for part in (text("instruction"), text("input")) if part)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": text("output")}]
    return Conversation(messages=messages, tools=normal_tools(row.get("tools")))


# ShareGPT: conversations of from and value

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "call", "observation": "tool", "tool": "tool",
}  # fmt: skip


def _is_sharegpt(row: Mapping[str, Any]) -> str | None:
    return "conversations with from/value" if {"from", "value"} <= set(_first_turn(row, "conversations")) else None


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    for number, turn in enumerate(_list_of_messages(row, "conversations"), start=1):
        role = _role(turn, "from", _SHAREGPT_ROLES, number)
        if turn.get("value") is None:
            raise BadRow("null content", f'message {number} ({turn["from"]}) has no "value", found {listed(turn)}')
        value = text_of(turn["value"], f"message {number}")
        if role == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": parse_calls(value, number)})
        else:
            messages.append({"role": role, "content": value})
    return Conversation(messages=messages, tools=normal_tools(row.get("tools")))


# OpenAI: messages of role and content

_OPENAI_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")


def _is_openai(row: Mapping[str, Any]) -> str | None:
    column = "messages" if "messages" in row else "conversations"
    return f"{column} with role/content" if "role" in _first_turn(row, column) else None


def _openai(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    for number, turn in enumerate(_list_of_messages(row, "messages"), start=1):
        role = _role(turn, "role", _OPENAI_ROLES, number)
        content, calls = turn.get("content"), turn.get("tool_calls")
        if content is None and not calls:
            raise BadRow("null content", f'message {number} ({role}) has neither "content" nor "tool_calls"')
        message: Message = {"role": role, "content": "" if content is None else text_of(content, f"message {number}")}
        if calls:
            if role != "assistant":
                raise BadRow("tool calls outside assistant", f"message {number} ({role}) has tool_calls")
            message["tool_calls"] = tool_calls(calls, number)
        messages.append(message | {key: turn[key] for key in _KEPT if turn.get(key) is not None})
    return Conversation(messages=messages, tools=normal_tools(row.get("tools")))


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            name="alpaca",
            columns=("instruction", "input", "output", "system", "history", "tools"),
            required=("instruction", "output"),
            recognise=_is_alpaca,
            convert=_alpaca,
        ),
        Format(
            name="sharegpt",
            columns=("conversations", "system", "tools"),
            required=("conversations",),
            recognise=_is_sharegpt,
            convert=_sharegpt,
        ),
        Format(
            name="openai",
            columns=("messages", "system", "tools"),
            required=("messages",),
            recognise=_is_openai,
            convert=_openai,
            aliases={"conversations": "messages"},
        ),
    )
}


_OTHER_STAGES = {
    ("chosen", "rejected"): "preference pairs (chosen, rejected), which sft does not learn from",
    ("rejected_response",): "preference pairs (rejected_response), which sft does not learn from",
    ("kto_tag",): "labelled answers (kto_tag), some of them bad ones",
    ("label",): "labelled answers (label), some of them bad ones",
    ("input_ids",): "tokenised rows (input_ids), which llmtune does not read yet",
}


def detect(rows: Sequence[Any], name: str) -> tuple[Format, str]:
    """The format of the first rows of data set `name`, and what made it out. Never a guess between two.

    A format is taken if it alone recognises rows, most of them; rows that differ are then reported one by one.
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for each in FORMATS.values():
            if isinstance(row, Mapping) and (why := each.recognise(row)):
                counts[each.name, why] = counts.get((each.name, why), 0) + 1
    named = "name it with data_format, or with `format` in the entry of dataset"
    columns = dict.fromkeys(str(column) for row in rows if isinstance(row, Mapping) for column in row)
    for signs, meaning in _OTHER_STAGES.items():
        if all(sign in columns for sign in signs) and (signs != ("label",) or _has_boolean_label(rows)):
            raise DataError(f"{name}: these look like {meaning}; to train on them as they are, {named}")
    formats = {found for found, _ in counts}
    if len(formats) == 1:
        (format_name, why), _ = max(counts.items(), key=lambda item: item[1])
        return FORMATS[format_name], why
    if formats:
        raise DataError(f"{name}: rows fit several formats ({listed(sorted(formats))}); {named}")
    wanted = "; ".join(f"{each.name}: {listed(each.required)}" for each in FORMATS.values())
    known = [column for each in FORMATS.values() for column in each.columns]
    near = next((hint for column in columns if (hint := did_you_mean(column, known))), "")
    raise DataError(
        f"{name}: the format could not be detected, found the columns {listed(columns) or 'none'}.{near} "
        f"Known formats need: {wanted}. Rename the columns, or {named}"
    )


def _has_boolean_label(rows: Sequence[Any]) -> bool:
    return any(isinstance(row, Mapping) and isinstance(row.get("label"), bool) for row in rows)
