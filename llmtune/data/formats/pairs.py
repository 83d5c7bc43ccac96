"""Preferences, and answers with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.data.formats.chats import VARIABLES, Completion
from llmtune.data.formats.messages_in import TagsConfig, asked_of, history_of, system_of, variables_of
from llmtune.data.messages import kind, normal_tools
from llmtune.examples import BadRow, Labelled, Message, Preference

_BEFORE = ("prompt", "messages", "conversations", "instruction", "input", "history", "system", "tools", *VARIABLES)


class PreferencePairs:
    """`chosen` and `rejected`: texts, a message, or messages.

    What they answer stands in `prompt` (text or messages), in `conversations` or `messages`, in `instruction` and
    `input`, or in what both begin with (UltraFeedback, TRL's implicit prompt). Also `messages`, whose last answer is
    the chosen one, with `rejected_response` (ms-swift).
    """

    kind = "preference"
    columns = (*_BEFORE, "chosen", "rejected", "rejected_response")
    required = ()

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.parts = Completion(config)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        if {"chosen", "rejected"} <= set(row):
            return "chosen and rejected"
        return "messages and rejected_response" if {"messages", "rejected_response"} <= set(row) else None

    def convert(self, row: Mapping[str, Any]) -> Preference:
        before = before_of(row, self.parts)
        if "rejected_response" in row and "chosen" not in row:
            if not before or before[-1]["role"] != "assistant":
                raise BadRow("no chosen answer", "messages ends with no answer by the assistant to be the chosen one")
            sides = [before, [*before[:-1], *self.parts.answer(row["rejected_response"], "rejected_response")]]
        else:
            missing = next((side for side in ("chosen", "rejected") if side not in row), None)
            if missing:
                raise BadRow(f"no {missing}", f'preference needs the column "{missing}", found {", ".join(row)}')
            sides = [self._side(row, side, before) for side in ("chosen", "rejected")]
        prompt, chosen, rejected = _split(*sides)
        return Preference(
            prompt=prompt, chosen=chosen, rejected=rejected, tools=normal_tools(row.get("tools")),
            template_kwargs=variables_of(row),
        )  # fmt: skip

    def _side(self, row: Mapping[str, Any], side: str, before: Sequence[Message]) -> list[Message]:
        answer = self.parts.answer(row[side], side)
        if not answer:
            raise BadRow(f"empty {side}", f'"{side}" holds no message')
        # Messages that begin with a question are the whole conversation; `prompt` then only repeats it.
        return answer if answer[0]["role"] in ("system", "user") else [*before, *answer]


def before_of(row: Mapping[str, Any], parts: Completion) -> list[Message]:
    """What an answer in another column answers."""
    messages = system_of(row)
    if row.get("prompt") is not None:
        return [*messages, *parts.prompt(row)]
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return [*messages, *parts.reader.messages(row[column], column)]
    if row.get("instruction") is not None:
        return [*messages, *history_of(row), *asked_of(row)]
    return messages


def _split(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The longest common beginning that ends with a question, and what follows on each side."""
    if chosen == rejected:
        raise BadRow("equal answers", "chosen and rejected are the same; nothing can be preferred")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and chosen[same - 1]["role"] not in ("user", "tool"):
        same -= 1
    prompt, sides = chosen[:same], (chosen[same:], rejected[same:])
    if not prompt:
        raise BadRow("no common prompt", "chosen and rejected do not begin with the same question")
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side) or "nothing"
            what = f"after the common prompt, {name} has {roles}; allowed are messages from assistant to assistant"
            raise BadRow("roles out of order", what)
    return prompt, *sides


class KtoRows:
    """A conversation and whether its last answer is wanted: `label` or `kto_tag`, true or false.

    The conversation stands in `messages` or `conversations`, in `prompt` and `completion` (TRL), or in `instruction`,
    `input` and `output` (LLaMA-Factory).
    """

    kind = "labelled"
    columns = (*_BEFORE, "completion", "output", "label", "kto_tag")
    required = ()

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.parts = Completion(config)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        if "kto_tag" in row:
            return "kto_tag"
        if not isinstance(row.get("label"), bool):
            return None
        beside = next((c for c in ("messages", "conversations", "completion", "output") if c in row), None)
        return f"{beside} and a label of true or false" if beside else None

    def convert(self, row: Mapping[str, Any]) -> Labelled:
        column = "kto_tag" if "kto_tag" in row else "label"
        if column not in row:
            raise BadRow("no label", f'kto needs the column "label" or "kto_tag", found {", ".join(row)}')
        label = row[column]
        if not isinstance(label, bool):
            shown = f"{kind(label)} ({label!r})"[:60]
            raise BadRow("label is not true or false", f'"{column}" is {shown}, allowed is true or false')
        messages = before_of(row, self.parts)
        for answer in ("completion", "output"):
            if row.get(answer) is not None:
                messages += self.parts.answer(row[answer], answer)
                break
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("no answer", "the conversation ends with no answer by the assistant to be labelled")
        return Labelled(
            messages=messages, label=label, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row)
        )
