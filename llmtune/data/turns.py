"""Where the assistant's turns stand in a rendering.

Turn i begins where the conversation up to it ends, generation prompt included, and ends where the conversation up to
and with it ends, less what the template writes after the end-of-turn token. Found by comparing renderings, never by
searching for token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.contract.examples import BadRow, Conversation, Message
from llmtune.media.marks import texts_between

_STAND_IN = "\ue000answer\ue000"  # private-use characters, which no text of a data set should hold
_APART = ("reasoning_content", "thinking")
"""Keys of a message's thinking."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where the trained part of an assistant turn stands in a rendering, in characters."""

    start: int
    stop: int
    ended: bool
    """Whether it closes with a special token, so that the model learns to stop."""
    weight: float = 1.0
    """What each of its tokens counts."""


class Special:
    """The strings of a tokenizer's special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        # Some tokenizers list line breaks as added tokens (Gemma); those end no turn.
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self.strings = tuple(sorted((token for token in added if token.strip()), key=len, reverse=True))
        self.pattern = re.compile("|".join(map(re.escape, self.strings)) or r"(?!)")
        self.ids = {int(token) for token in tokenizer.convert_tokens_to_ids(list(self.strings))}
        self.closings: dict[str, int] = {}
        """Special tokens in a row after an answer, and how many of their characters end it; see `Script`."""

    def without_tail(self, text: str) -> str:
        """`text` without the special tokens and white space it ends with."""
        text = text.rstrip()
        while text.endswith(self.strings):
            token = next(token for token in self.strings if text.endswith(token))
            text = text[: -len(token)].rstrip()
        return text


class Script:
    """One conversation and its renderings, each made once."""

    def __init__(
        self, conversation: Conversation, render: Callable[..., str], special: Special, full: str = ""
    ) -> None:
        """`render(messages, prompt=False)` is the template's text; `full` the conversation's, if it is known."""
        self.messages = conversation.messages
        self._render, self.special = render, special
        self._seen: dict[tuple[int, bool], str] = {(len(self.messages), False): full} if full else {}

    def upto(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages; with `prompt` up to where the assistant begins to speak."""
        if not count:
            return ""
        if (count, prompt) not in self._seen:
            self._seen[count, prompt] = self._render(self.messages[:count], prompt)
        return self._seen[count, prompt]

    @property
    def full(self) -> str:
        return self.upto(len(self.messages))

    def renderings(self, pending: list[int], has_prompt: bool) -> list[tuple[str, list[Turn], int]]:
        """Texts in which the turns `pending` train, with those and the number of messages that are in it: one, or
        several where the template needs it.

        Templates that write earlier turns otherwise than the latest (thinking removed, say) show a turn as the model
        has to produce it only while it is the latest. Such a turn trains in a rendering that ends there, together
        with all others that stand in it unchanged.
        """
        found, length = [], len(self.messages)
        while pending:
            text = self.upto(length)
            turns = {at: turn for at in pending if (turn := self._turn(at, text, has_prompt))}
            if turns:
                found.append((text, list(turns.values()), length))
            pending = [at for at in pending if at not in turns]
            length = pending[-1] + 1 if pending else 0
        return found

    def _turn(self, at: int, text: str, has_prompt: bool) -> Turn | None:
        """Turn `at` in `text`, or None where `text` shows it otherwise than as the latest turn."""
        whole = self.upto(at + 1)
        same = common(whole, text)
        written = self._written(at, whole)
        special = self.special.pattern
        if same < len(whole) and (written is None or not special.search(whole[:same], written[1])):
            return None
        head = self.upto(at, prompt=True)
        if has_prompt and at > 0 and whole.startswith(head):
            start = len(head)
        elif probed := self._probe(at, whole):
            start, _ = probed  # the template gives no prompt, or another one than it writes before the answer
        else:
            raise BadRow("turns cannot be told apart", f"the template writes message {at + 1} in no recognisable place")
        tail = max(start, written[1] if written else start)
        ends = [match.span() for match in special.finditer(whole[:same], tail)]
        stop = written[1] if written else same
        if ends:  # a call's own marks may be special tokens; after a text the first one ends the turn
            stop = ends[-1][1] if self.messages[at].get("tool_calls") else self._closed(at, whole, ends)
        self._check_thinking(at, whole)
        return Turn(start=start, stop=stop, ended=bool(ends), weight=self.messages[at].get("weight", 1.0))

    def _closed(self, at: int, whole: str, ends: list[tuple[int, int]]) -> int:
        """Where a text's end of turn ends: after its first special token, or after those that always follow it.

        Command A closes a turn with two. Others write a second one only after the last message, which the model never
        has to say; so what counts is what stands there, too, when somebody speaks next.
        """
        first, stop = ends[0]
        for start, end in ends[1:]:
            if start != stop:
                break
            stop = end
        row = whole[first:stop]
        if stop > ends[0][1] and row not in self.special.closings:
            try:
                longer = self._render([*self.messages[: at + 1], {"role": "user", "content": _STAND_IN}], False)
            except BadRow:
                longer = ""
            same = common(whole, longer)
            stop = max((end for _, end in ends if end <= min(same, stop)), default=ends[0][1])
            self.special.closings[row] = stop - first
        return first + self.special.closings.get(row, len(row))

    def _check_thinking(self, at: int, whole: str) -> None:
        thought = thinking_of(self.messages[at])
        if thought and not _shows(whole, thought):
            raise BadRow(
                "thinking not rendered",
                f"the thinking of message {at + 1} is not in the rendering; the template leaves it out. Choose a "
                "`template` that writes it, or set `enable_thinking: false` to train without it",
            )

    def _written(self, at: int, whole: str) -> tuple[int, int] | None:
        """Where the text of message `at`, the last one in `whole`, stands in it; None if that cannot be told."""
        text = answer_of(self.messages[at]).strip()
        if calls := self.messages[at].get("tool_calls"):
            name = calls[-1]["function"]["name"]
            after = whole.rfind(name)
            begin = whole.rfind(text, 0, after) if text else -1
            return (begin, after + len(name)) if begin >= 0 else None
        if self.special.pattern.search(text):
            return self._probe(at, whole)
        body = self.special.without_tail(whole)
        begin = len(body) - len(text) if body.endswith(text) else whole.rfind(text)
        return (begin, begin + len(text)) if text and begin >= 0 else None

    def _probe(self, at: int, whole: str) -> tuple[int, int] | None:
        """The same, found at the cost of a rendering with a stand-in for the text that occurs nowhere else."""
        message = self.messages[at]
        thinking = message["content"].removesuffix(answer_of(message))
        for kept in dict.fromkeys(("", thinking)):  # thinking is kept where the template writes it elsewhere
            probe = self._render([*self.messages[:at], {**message, "content": kept + _STAND_IN}], False)
            before, found, after = probe.partition(_STAND_IN)
            if found and whole.startswith(before) and whole.endswith(after):
                return len(before), max(len(before), len(whole) - len(after))
        return None


def check_texts(conversation: Conversation, full: str) -> None:
    """BadRow if something of the conversation is missing in the rendering: a typo in the template, say."""
    hint = "; the template leaves it out. Mend it, or choose another `template`"
    of_tools = "; the template writes no tools. Set `tool_format: hermes`, or choose another `template`"
    place = 0  # most templates write messages in their order, so that each is looked for from where the last one stood
    for number, message in enumerate(conversation.messages, start=1):
        for text in texts_between(answer_of(message)) or [""]:  # how a template writes media is not compared
            text = text.strip()
            found = full.find(text, place)
            if found >= 0:
                place = found + len(text)
            elif not _shows(full, text):
                what = f"the text of message {number} ({message['role']})"
                raise BadRow("text not rendered", f"{what} is not in the rendering{hint}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in full:
                what = f"the tool call in message {number}"
                raise BadRow("text not rendered", f"{what} is not in the rendering{of_tools}")
    for tool in conversation.tools or ():
        if tool["function"]["name"] not in full:
            raise BadRow("text not rendered", f"the tool {tool['function']['name']} is not in the rendering{of_tools}")


def answer_of(message: Message) -> str:
    """A message's text without inline thinking, which templates move or drop."""
    content = message["content"]
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


def thinking_of(message: Message) -> str:
    """What a message thinks before it answers, spelt apart or inline; mostly nothing."""
    apart = next((message[key] for key in _APART if message.get(key)), "")
    if apart or message["role"] != "assistant" or "</think>" not in message["content"]:
        return apart
    return message["content"].partition("</think>")[0].rpartition("<think>")[2].strip()


def without_thinking(messages: list[Message]) -> list[Message]:
    """The messages, less what the assistant thinks."""
    return [
        {**{key: value for key, value in each.items() if key not in _APART}, "content": answer_of(each).lstrip("\n")}
        if each["role"] == "assistant" and (thinking_of(each) or "</think>" in each["content"])
        else each
        for each in messages
    ]


def _shows(full: str, text: str) -> bool:
    text = text.strip()
    if text in full or json.dumps(text, ensure_ascii=False)[1:-1] in full:
        return True
    return " ".join(text.split()) in " ".join(full.split())


def common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
