"""Rows without answers: prompts, texts, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.contract.examples import BadRow, Prompt, Text, Tokens
from llmtune.data.formats.chats import PAIRED, VARIABLES, PromptCompletion
from llmtune.data.formats.messages_in import TagsConfig, led, variables_of
from llmtune.data.messages import kind, normal_tools


class PromptOnly:
    """`prompt` (text or messages), or `messages` that end with a question. All other columns are kept beside it."""

    kind = "prompt"
    columns = ("prompt", "messages", "system", "tools", *VARIABLES)
    required = ()
    needs = "prompt"

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.parts = PromptCompletion(config)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        others = ("completion", "messages", "conversations", "conversation", "output", "response", "answer", "text")
        return "prompt" if "prompt" in row and not any(c in row for c in (*others, *PAIRED)) else None

    def convert(self, row: Mapping[str, Any]) -> Prompt:
        if row.get("prompt") is not None:
            messages = led(row, self.parts.prompt(row))
        elif row.get("messages") is not None:
            messages = led(row, self.parts.reader.messages(row["messages"], "messages"))
        else:
            raise BadRow("no prompt", f'prompt needs the column "prompt" or "messages", found {", ".join(row)}')
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            last = messages[-1]["role"] if messages else "nothing"
            raise BadRow("no question", f"the prompt ends with {last}, allowed is a user or tool message")
        extra = {column: value for column, value in row.items() if column not in self.columns}
        return Prompt(
            messages=messages, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row), extra=extra
        )


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Rows of one column."""


class PlainText:
    """`text`, all of which is learnt, and its end."""

    kind = "text"
    columns = ("text",)
    required = ("text",)

    def __init__(self, config: PlainConfig | None = None) -> None:
        self.config = config or PlainConfig()

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        others = ("messages", "conversations", "conversation", "instruction", "prompt", "input_ids", *PAIRED)
        only = isinstance(row.get("text"), str) and not any(column in row for column in others)
        return "text" if only else None

    def convert(self, row: Mapping[str, Any]) -> Text:
        text = row["text"]
        if not isinstance(text, str):
            raise BadRow("text is not text", f'"text" is {kind(text)}, allowed is text')
        if not text.strip():
            raise BadRow("empty text", '"text" is empty')
        return Text(text=text)


class TokenRows:
    """`input_ids`, and `labels` that are -100 where a token is not learnt and else the token itself."""

    kind = "tokens"
    columns = ("input_ids", "labels", "attention_mask")
    required = ("input_ids",)

    def __init__(self, config: PlainConfig | None = None) -> None:
        self.config = config or PlainConfig()

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        if "input_ids" not in row:
            return None
        return "input_ids and labels" if "labels" in row else "input_ids"

    def convert(self, row: Mapping[str, Any]) -> Tokens:
        ids = _numbers(row["input_ids"], "input_ids")
        if not ids:
            raise BadRow("empty input_ids", '"input_ids" is empty')
        if min(ids) < 0:
            raise BadRow("input_ids is no token", f'"input_ids" holds {min(ids)}, allowed are numbers from 0')
        labels = _numbers(row["labels"], "labels") if row.get("labels") is not None else None
        mask = _numbers(row["attention_mask"], "attention_mask") if row.get("attention_mask") is not None else None
        for name, other in (("labels", labels), ("attention_mask", mask)):
            if other is not None and len(other) != len(ids):
                what = f'"{name}" has {len(other):,} entries, "input_ids" {len(ids):,}; they must be as many'
                raise BadRow("lengths differ", what)
        if labels is not None:
            wrong = next((at for at, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (-100, a)), None)
            if wrong is not None:
                what = f"labels[{wrong}] is {labels[wrong]}, allowed are -100 and the token {ids[wrong]} itself"
                raise BadRow("labels are other tokens", what)
        if mask is not None and not all(mask):
            kept = [at for at, one in enumerate(mask) if one]  # padding of a length that is not ours
            ids, labels = [ids[at] for at in kept], [labels[at] for at in kept] if labels is not None else None
        return Tokens(input_ids=ids, labels=labels)


def _numbers(value: Any, column: str) -> list[int]:
    """A list of whole numbers from -2^31 to below 2^31."""
    whole = isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    if not whole:
        raise BadRow(f"{column} is not numbers", f'"{column}" is {kind(value)}, allowed is a list of whole numbers')
    if any(not -(2**31) <= each < 2**31 for each in value):
        raise BadRow(f"{column} is no token", f'"{column}" holds {max(value, key=abs)}, which no vocabulary has')
    return value
