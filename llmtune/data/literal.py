"""`split_special_tokens`: special tokens that a message's text spells are read as plain text.

While a conversation is rendered, stand-ins of private-use characters take their place, so that the template's own
special tokens can be told from them; what stands between those is then tokenised with its text put back.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from llmtune.contract.examples import BadRow, Conversation

_FIRST = 0xE100
_STAND_IN = re.compile("\ue001(.)\ue002")


class Literal:
    """Stand-ins for a tokenizer's special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        found = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.strings = sorted((text for text in found if text.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or r"(?!)")
        self._number = {text: number for number, text in enumerate(self.strings)}

    def guarded(self, conversation: Conversation) -> Conversation:
        """The conversation with stand-ins in its texts. BadRow if it holds such characters already."""
        messages = [self._guarded(message) for message in conversation.messages]
        if messages == conversation.messages:
            return conversation
        return replace(conversation, messages=messages)

    def restored(self, text: str) -> str:
        """The text with what the stand-ins stand for."""
        return _STAND_IN.sub(lambda found: self.strings[ord(found[1]) - _FIRST], text)

    def _guarded(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: self._guarded(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [self._guarded(part) for part in value]
        if not isinstance(value, str) or key == "role":
            return value
        if _STAND_IN.search(value):
            raise BadRow("private-use characters", "a text holds U+E001 and U+E002, which split_special_tokens needs")
        return self._pattern.sub(lambda found: f"\ue001{chr(_FIRST + self._number[found[0]])}\ue002", value)
