"""Turns found without rendering each of them, where that was shown to give the same.

Finding turns one by one renders a conversation of k turns 2 k times. But most templates write all turns of a kind
alike: a generation prompt, the answer, what ends it. The first few of each kind are found turn by turn, which teaches
what stands before and after; once the quick way has given the same for some conversations, later ones need one
rendering. A kind is told by all that templates are known to look at: who spoke before and speaks after, whether a user
speaks later, calls, tools, system message, variables, and the keys and roles of all messages. Thinking is never found
quickly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmtune.contract.examples import Conversation, Message
from llmtune.data.turns import Script, Special, Turn, thinking_of

_PROVED = 4
"""Conversations that are looked at both ways before the quick one is trusted with a kind of turn."""
Found = Sequence[tuple[str, list[Turn], int]]
"""Texts in which turns train, those turns, and how many messages each has."""


@dataclass
class _Kind:
    before: str
    """What stands right before an answer, and nowhere else."""
    after: str
    """What follows its text; of an answer that calls, the token that ends it."""
    proved: int = 0


class Shapes:
    """What is known of the kinds of turns that were seen."""

    def __init__(self, special: Special) -> None:
        self._special = special
        self._known: dict[Hashable, _Kind | None] = {}

    def turns(self, conversation: Conversation, full: str, pending: Sequence[int]) -> list[Turn] | None:
        """The trained turns `pending` in the rendering `full`; None where they have to be found turn by turn."""
        kinds = []
        for key in _keys(conversation, pending):
            kind = self._known.get(key)
            if kind is None or kind.proved < _PROVED:
                return None
            kinds.append(kind)
        return self._find(kinds, conversation.messages, full, pending)

    def learn(self, conversation: Conversation, script: Script, pending: Sequence[int], found: Found) -> None:
        """Take note of what finding them turn by turn has given."""
        keys = _keys(conversation, pending)
        kinds: list[_Kind | None] = []
        for number, key in enumerate(keys):
            if key not in self._known:
                split = len(found) != 1
                self._known[key] = None if split else self._kind(script, pending[number], found[0][1][number])
            kinds.append(self._known[key])
        whole = [kind for kind in kinds if kind is not None]
        if len(found) == 1 and len(whole) < len(kinds):
            return  # one kind is not found quickly; that says nothing of the others
        if len(found) == 1 and self._find(whole, script.messages, script.full, pending) == found[0][1]:
            for kind in {id(kind): kind for kind in whole}.values():
                kind.proved += 1
        else:
            self._known |= dict.fromkeys(keys)

    def _kind(self, script: Script, at: int, turn: Turn) -> _Kind | None:
        """What one turn, found without a doubt, teaches."""
        message, full = script.messages[at], script.full
        if not turn.ended:
            return None
        base, head = script.upto(at), script.upto(at, prompt=True)
        before = head[len(base) :] if head.startswith(base) else ""
        if not before and at:  # the template knows no generation prompt: what follows the text that is answered
            asked = script.messages[at - 1]["content"].strip()
            place = full.rfind(asked, 0, turn.start)
            before = full[place + len(asked) : turn.start] if asked and place >= 0 else ""
        answered = turn.start + len(message["content"].strip())
        if not before.strip() or full[turn.start - len(before) : turn.start] != before:
            return None
        if not message.get("tool_calls"):
            return _Kind(before=before, after=full[answered : turn.stop])
        ends = [end for end in self._special.strings if full[: turn.stop].endswith(end)]
        return _Kind(before=before, after=ends[0]) if ends else None

    def _find(
        self, kinds: Sequence[_Kind], messages: Sequence[Message], full: str, pending: Sequence[int]
    ) -> list[Turn] | None:
        """The turns, if what comes before answers stands in the text as often as there are answers, before each."""
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not kinds or any(kind.before != kinds[0].before for kind in kinds):
            return None
        before = kinds[0].before
        if full.count(before) != len(answers):
            return None  # a message's text spells one, or the template writes some answers without
        turns, place, number = [], 0, 0
        for at in answers:
            start = full.index(before, place) + len(before)
            place = start
            if number == len(pending) or at != pending[number]:
                continue
            message, kind = messages[at], kinds[number]
            stop = self._stop(message, kind.after, full, start)
            if stop is None:
                return None
            turns.append(Turn(start=start, stop=stop, ended=True, weight=message.get("weight", 1.0)))
            place, number = stop, number + 1
        return turns

    def _stop(self, message: Message, after: str, full: str, start: int) -> int | None:
        """Where the turn that begins at `start` ends; None if it is not written as the others were."""
        text, calls = message["content"].strip(), message.get("tool_calls") or ()
        place = start + len(text)
        if full[start:place] != text or not (text or calls):
            return None
        if not calls:
            stop = place + len(after)
            return stop if full[place:stop] == after else None
        for call in calls:
            if self._special.pattern.search(str(call["function"])):
                return None  # what ends the turn may be spelt in what it says
            place = full.find(call["function"]["name"], place) + len(call["function"]["name"])
        stop = full.find(after, place)
        return stop + len(after) if stop >= 0 else None


def _keys(conversation: Conversation, pending: Sequence[int]) -> list[Hashable]:
    """The kind of each turn; none where the quick way does not fit."""
    messages = conversation.messages
    if any(message["role"] == "assistant" and thinking_of(message) for message in messages):
        return []
    if any("</think>" in messages[at]["content"] for at in pending):
        return []
    roles = [message["role"] for message in messages]
    asked = max((at for at, role in enumerate(roles) if role == "user"), default=-1)
    whole = (
        frozenset((message["role"], *sorted(message)) for message in messages),
        roles[0],
        roles.count("assistant") > 1,
        conversation.tools is None,
        repr(conversation.template_kwargs),
    )
    return [
        (
            whole,
            roles[at - 1] if at else None,
            roles[at + 1] if at + 1 < len(roles) else None,
            at > asked,
            bool(messages[at]["content"]),
            min(2, len(messages[at].get("tool_calls") or ())),
        )
        for at in pending
    ]
