"""Tokenised samples in three flat arrays: 5 bytes a token, no Python object a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSamples:
    """Samples ready for training. A sample is one rendered conversation, or the part of one that trains together."""

    ids: np.ndarray
    """(tokens,) int32, all samples end to end."""
    mask: np.ndarray
    """(tokens,) bool, True where the token is trained. Never True for a sample's first token."""
    starts: np.ndarray
    """(samples + 1,) int64, where each sample begins in `ids`."""
    rows: np.ndarray
    """(samples,) int64, the row of the data set a sample comes from, counted over all files."""
    origins: Sequence[str] = field(default_factory=tuple, repr=False)
    """By row: `path:line` or `path:row N`, for error messages."""

    @staticmethod
    def from_lists(
        samples: Sequence[tuple[np.ndarray, np.ndarray]], rows: Sequence[int] | np.ndarray, origins: Sequence[str] = ()
    ) -> TokenSamples:
        """Join (ids, mask) pairs; `rows[i]` is the row that sample i comes from."""
        starts = np.zeros(len(samples) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in samples], out=starts[1:])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in samples)]).astype(np.int32)
        mask = np.concatenate([np.zeros(0, bool), *(mask for _, mask in samples)]).astype(bool)
        mask[starts[:-1][np.diff(starts) > 0]] = False
        return TokenSamples(ids=ids, mask=mask, starts=starts, rows=np.asarray(rows, dtype=np.int64), origins=origins)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> np.ndarray:
        """(samples,) trained tokens of each sample."""
        total = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of one sample, as views."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.mask[part]

    def origin(self, index: int) -> str:
        """Where the sample comes from: `path:line` or `path:row N`."""
        row = int(self.rows[index])
        return self.origins[row] if row < len(self.origins) else f"row {row}"

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenSamples:
        """A copy of the given samples, in the given order."""
        return TokenSamples.from_lists(
            [self.sample(int(index)) for index in indices], self.rows[np.asarray(indices, dtype=np.int64)], self.origins
        )
