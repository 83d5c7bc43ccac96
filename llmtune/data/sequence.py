"""One sequence of tokens, on its way from a row to a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llmtune.contract.examples import ShownText


class TokenSequence(NamedTuple):
    """One sequence: tokens that see each other, and which of them train."""

    ids: np.ndarray
    """(tokens,) int32."""
    mask: np.ndarray
    """(tokens,) bool, whether a token trains. Of the first token it is not asked: nothing stands before it."""
    weights: np.ndarray | None = None
    """(tokens,) float32, what a trained token counts; None: all count 1. A token of weight 0 does not train."""
    end_ids: tuple[int, ...] = ()
    """The last trained token of each turn that closes with a special token."""
    cuts: tuple[int, ...] = ()
    """Numbers of tokens after which a turn of the assistant is whole: where a sample may be cut."""
    shown: ShownText | None = None
    """The text that the tokens were made from with its media, where there are any; such a sequence is never cut."""

    @property
    def all_weights(self) -> np.ndarray:
        """(tokens,) float32, ones where no weights are given."""
        return np.ones(len(self.ids), np.float32) if self.weights is None else self.weights

    def part(self, start: int, stop: int) -> TokenSequence:
        """The tokens from `start` up to `stop`, as views."""
        weights = None if self.weights is None else self.weights[start:stop]
        return TokenSequence(self.ids[start:stop], self.mask[start:stop], weights)
