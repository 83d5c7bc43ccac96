"""Tokens of an answer become text while they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
"""What stands for a part of a character, until the tokens with the rest have come."""


@dataclass
class TextDecoder:
    """Tokens of an answer become pieces of its text as soon as their characters are whole."""

    tokenizer: PreTrainedTokenizerBase
    skip_special_tokens: bool = True
    kept: frozenset[int] = frozenset()
    """Special tokens that are told all the same."""
    _ids: list[int] = field(default_factory=list)
    _told: str = ""
    """The text of `_ids` that has been given away."""

    def push(self, token: int) -> str:
        """The text that is new with a token."""
        if token in self.kept:
            return self.rest() + str(self.tokenizer.decode([token]))
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_BROKEN):
            return ""
        new, self._told = text[len(self._told) :], text
        if len(self._ids) > 64:  # text goes on as it does after the tokens before it, of which some stay for that
            self._ids = self._ids[-8:]
            self._told = self._decode(self._ids)
        return new

    def rest(self) -> str:
        """What has been held back, a broken character as it is; at the end of the answer."""
        text = self._decode(self._ids)[len(self._told) :]
        self._ids, self._told = [], ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens))
