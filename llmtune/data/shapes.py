"""Turns found without rendering each of them, where that was shown to give the same.

Conversations of one shape (the same roles in the same order, without tool calls or thinking) differ in their texts
only, and most templates write them alike. The first few of a shape are rendered turn by turn; if what stands before
and after their answers is always the same and tells the turns apart, later ones need one rendering each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.data.turns import Script, Turn
from llmtune.examples import Conversation

_PROVED = 4
"""Conversations of a shape that are looked at both ways before the quick one is trusted."""
Found = Sequence[tuple[str, list[Turn]]]
"""Texts in which turns train, and those turns."""
_THINKING = ("reasoning_content", "thinking", "tool_calls")


@dataclass
class _Shape:
    before: str
    """The generation prompt."""
    after: str
    """What ends an answer."""
    proved: int = 0


class Shapes:
    """What is known of the shapes that were seen."""

    def __init__(self) -> None:
        self._known: dict[str, _Shape | None] = {}

    def turns(self, conversation: Conversation, full: str, pending: Sequence[int]) -> list[Turn] | None:
        """The trained turns `pending` in the rendering `full`; None where they have to be found turn by turn."""
        key = _key(conversation, pending)
        shape = self._known.get(key) if key is not None else None
        if shape is None or shape.proved < _PROVED:
            return None
        return _find(shape, conversation, full, pending)

    def learn(
        self,
        conversation: Conversation,
        script: Script,
        pending: Sequence[int],
        found: Sequence[tuple[str, list[Turn]]],
    ) -> None:
        """Take note of what finding them turn by turn has given."""
        key = _key(conversation, pending)
        if key is None or (key in self._known and self._known[key] is None):
            return
        shape = self._known.get(key) or _shape_of(script, pending, found)
        if shape is not None:
            alike = len(found) == 1 and _find(shape, conversation, script.full, pending) == found[0][1]
            shape.proved += 1
            shape = shape if alike else None
        self._known[key] = shape


def _key(conversation: Conversation, pending: Sequence[int]) -> str | None:
    """The shape of a conversation, or None where the quick way does not fit."""
    messages = conversation.messages
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if answers != list(pending) or any(key in message for message in messages for key in _THINKING):
        return None
    if any("</think>" in messages[at]["content"] for at in pending):
        return None
    roles = [(message["role"], bool(message["content"]), sorted(message)) for message in messages]
    return json.dumps([roles, conversation.tools is None, conversation.template_kwargs], default=str)


def _shape_of(script: Script, pending: Sequence[int], found: Found) -> _Shape | None:
    if len(found) != 1 or not pending:
        return None
    at, turn = pending[-1], found[0][1][-1]
    base, head = script.upto(at), script.upto(at, prompt=True)
    text = script.messages[at]["content"].strip()
    answered = turn.start + len(text)
    if not head.startswith(base) or len(head) == len(base) or script.full[turn.start : answered] != text:
        return None
    return _Shape(before=head[len(base) :], after=script.full[answered : turn.stop]) if turn.ended else None


def _find(shape: _Shape, conversation: Conversation, full: str, pending: Sequence[int]) -> list[Turn] | None:
    """The turns, if as many generation prompts stand in the text as there are answers, each before its own."""
    if full.count(shape.before) != len(pending):
        return None  # a message's text spells one, or the template writes none
    turns, place = [], 0
    for at in pending:
        message = conversation.messages[at]
        start = full.index(shape.before, place) + len(shape.before)
        text = message["content"].strip()
        stop = start + len(text) + len(shape.after)
        if not text or full[start:stop] != text + shape.after:
            return None
        turns.append(Turn(start=start, stop=stop, ended=True, weight=message.get("weight", 1.0)))
        place = stop
    return turns
