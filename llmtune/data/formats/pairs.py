"""Preferences, and answers with a label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.contract.errors import listed
from llmtune.contract.examples import BadRow, Message, Preference, UnpairedPreference
from llmtune.data.formats.chats import VARIABLES, PromptCompletion, is_label
from llmtune.data.formats.messages_in import TagsConfig, asked_of, held_in, history_of, led, system_of, variables_of
from llmtune.data.messages import kind, normal_tools

_BEFORE = ("prompt", "messages", "conversations", "instruction", "input", "history", "system", "tools", *VARIABLES)


_OTHER_SIDE = ("rejected_response", "rejected_messages")


class PreferencePairs:
    """`chosen` and `rejected`: texts, a message, or messages.

    What they answer stands in `prompt` (text or messages), in `conversations` or `messages`, in `instruction` and
    `input`, or in what both begin with (UltraFeedback, TRL's implicit prompt). Also `messages`, whose last answer is
    the chosen one, with `rejected_response` or `rejected_messages` (ms-swift); and `chosen_messages` with
    `rejected_messages` (LLaMA-Factory).
    """

    kind = "preference"
    columns = ("chosen", "rejected", "chosen_messages", "margin", *_BEFORE, *_OTHER_SIDE)
    required = ()
    needs = "chosen and rejected, or messages and rejected_response"

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.parts = PromptCompletion(config)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        if {"chosen", "rejected"} <= set(row):
            return "chosen and rejected"
        if {"chosen_messages", "rejected_messages"} <= set(row):
            return "chosen_messages and rejected_messages"
        other = next((column for column in _OTHER_SIDE if column in row), None)
        return f"messages and {other}" if other and "messages" in row else None

    def convert(self, row: Mapping[str, Any]) -> Preference:
        if row.get("chosen_messages") is not None:
            row = {**row, "chosen": row["chosen_messages"], "rejected": row.get("rejected_messages")}
        before = before_of(row, self.parts)
        if row.get("chosen") is None and any(row.get(column) is not None for column in _OTHER_SIDE):
            sides = self._beside(row, before)
        else:
            missing = next((side for side in ("chosen", "rejected") if side not in row), None)
            if missing:
                raise BadRow(f"no {missing}", f'preference needs the column "{missing}", found {", ".join(row)}')
            sides = [self._side(row, side, before) for side in ("chosen", "rejected")]
        prompt, chosen, rejected = _split(*sides)
        return Preference(
            prompt=prompt, chosen=chosen, rejected=rejected, tools=normal_tools(row.get("tools")),
            template_kwargs=variables_of(row), extra=_margin(row),
        )  # fmt: skip

    def _beside(self, row: Mapping[str, Any], before: list[Message]) -> list[list[Message]]:
        """`messages`, which end with the chosen answer, and the same with the rejected one."""
        if not before or before[-1]["role"] != "assistant":
            raise BadRow("no chosen answer", "messages ends with no answer by the assistant to be the chosen one")
        if row.get("rejected_messages") is not None:
            return [before, led(row, self.parts.reader.messages(row["rejected_messages"], "rejected_messages"))]
        return [before, [*before[:-1], *self.parts.answer(row.get("rejected_response"), "rejected_response")]]

    def _side(self, row: Mapping[str, Any], side: str, before: Sequence[Message]) -> list[Message]:
        answer = self.parts.answer(row[side], side)
        if not answer:
            raise BadRow(f"empty {side}", f'"{side}" holds no message')
        # Messages that begin with a question are the whole conversation; `prompt` then only repeats it.
        if answer[0]["role"] in ("system", "user"):
            return led(row, answer)
        if not any(message["role"] != "system" for message in before):
            what = "prompt, messages, conversations or instruction, or a question in both sides"
            raise BadRow("no prompt", f"nothing says what {side} answers; needed is {what}, found {listed(row)}")
        return [*before, *answer]


def before_of(row: Mapping[str, Any], parts: PromptCompletion) -> list[Message]:
    """What an answer in another column answers."""
    if row.get("prompt") is not None:
        return led(row, parts.prompt(row))
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return led(row, parts.reader.messages(row[column], column))
    if row.get("instruction") is not None:
        return [*system_of(row), *history_of(row), *asked_of(row)]
    return system_of(row)


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
    one, other = next((pair for pair in zip(chosen, rejected, strict=False) if pair[0] != pair[1]), ({}, {}))
    if not prompt and one.get("media") != other.get("media"):
        what = "chosen and rejected begin with questions that show other pictures, video or sound"
        raise BadRow("media of one answer", f"{what}; both have to answer the same question")
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
    columns = ("label", "kto_tag", *_BEFORE, "completion", "output")
    required = ()
    needs = "label or kto_tag beside an answer"

    def __init__(self, config: TagsConfig | None = None) -> None:
        self.parts = PromptCompletion(config)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        if "kto_tag" in row:
            return "kto_tag"
        if not is_label(row.get("label")):
            return None
        beside = next((c for c in ("messages", "conversations", "completion", "output") if c in row), None)
        what = "of true or false" if isinstance(row["label"], bool) else "that has to be true or false"
        return f"{beside} and a label {what}" if beside else None

    def convert(self, row: Mapping[str, Any]) -> UnpairedPreference:
        column = held_in(row, ("kto_tag", "label"))
        if column is None:
            raise BadRow("no label", f'kto needs the column "label" or "kto_tag", found {", ".join(row)}')
        label = row[column]
        if not isinstance(label, bool):
            shown = f"{kind(label)} ({label!r})"[:60]
            other = "; if it means something else, name the rows' `format`" if column == "label" else ""
            raise BadRow("label is not true or false", f'"{column}" is {shown}, allowed is true or false{other}')
        messages = before_of(row, self.parts)
        for answer in ("completion", "output"):
            if row.get(answer) is not None:
                messages += self.parts.answer(row[answer], answer)
                break
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("no answer", "the conversation ends with no answer by the assistant to be labelled")
        return UnpairedPreference(
            messages=messages, label=label, tools=normal_tools(row.get("tools")), template_kwargs=variables_of(row)
        )


def _margin(row: Mapping[str, Any]) -> dict[str, float]:
    """By how much the chosen answer is better, where the row says so."""
    margin = row.get("margin")
    if margin is None:
        return {}
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise BadRow("margin is no number", f'"margin" is {margin!r}, allowed is a finite number')
    return {"margin": float(margin)}
