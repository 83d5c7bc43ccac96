"""Tokenised samples in flat arrays, in memory or mapped from files: 5 bytes a token, no Python object a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSamples:
    """Samples ready for training. A sample is `width` sequences: one, or two for a preference (chosen, rejected)."""

    ids: np.ndarray
    """(tokens,) int32, all sequences end to end."""
    mask: np.ndarray
    """(tokens,) bool, True where the token is trained. Never True for a sequence's first token."""
    starts: np.ndarray
    """(samples * width + 1,) int64, where each sequence begins in `ids`."""
    rows: np.ndarray
    """(samples,) int64, the row a sample comes from, counted over all data sets."""
    sets: np.ndarray | None = None
    """(samples,) int32, the number of its data set in `set_names`; None: all are of the first."""
    set_names: Sequence[str] = ("dataset",)
    weights: np.ndarray | None = None
    """(tokens,) float32, what a trained token counts; None: all count 1."""
    labels: np.ndarray | None = None
    """(samples,) bool, whether the answer is wanted, where rows are labelled so (KTO)."""
    width: int = 1
    kind: str = "conversation"
    """`conversation` (also of text and tokens), `preference`, `labelled` or `prompt`."""
    place: Callable[[int], str] | None = field(default=None, repr=False)
    """Where a row stands: `path:line` or `path:row N`."""
    digest: str = ""
    """SHA-256 of the arrays, as they were written; empty where they never were."""

    @staticmethod
    def from_lists(
        sequences: Sequence[tuple[np.ndarray, np.ndarray]],
        rows: Sequence[int] | np.ndarray,
        origins: Sequence[str] = (),
        **more: Any,
    ) -> TokenSamples:
        """Join (ids, mask) pairs; `rows[i]` is the row that sample i comes from, `origins` where the rows stand."""
        starts = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in sequences], out=starts[1:])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in sequences)]).astype(np.int32)
        mask = np.concatenate([np.zeros(0, bool), *(mask for _, mask in sequences)]).astype(bool)
        mask[starts[:-1][np.diff(starts) > 0]] = False
        place = origins.__getitem__ if origins else None
        return TokenSamples(
            ids=ids, mask=mask, starts=starts, rows=np.asarray(rows, dtype=np.int64), place=place, **more
        )

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.width

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample, all its sequences."""
        return self.starts[self.width :: self.width] - self.starts[: -1 : self.width]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.starts).max()) if len(self) else 0

    @property
    def supervised(self) -> np.ndarray:
        """(samples,) trained tokens of each sample."""
        total = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        return total[self.starts[self.width :: self.width]] - total[self.starts[: -1 : self.width]]

    def sequences(self, index: int) -> list[slice]:
        """Where the sequences of one sample stand in `ids`, `mask` and `weights`."""
        bounds = self.starts[index * self.width : (index + 1) * self.width + 1].tolist()
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of one sample, all its sequences, as views."""
        part = slice(self.starts[index * self.width], self.starts[(index + 1) * self.width])
        return self.ids[part], self.mask[part]

    def set_of(self, index: int) -> int:
        """The number of the data set that a sample comes from."""
        return int(self.sets[index]) if self.sets is not None else 0

    def origin(self, index: int) -> str:
        """Where the sample comes from: `path:line` or `path:row N`."""
        row = int(self.rows[index])
        return self.place(row) if self.place is not None else f"row {row}"

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenSamples:
        """A copy of the given samples, in the given order."""
        chosen = np.asarray(indices, dtype=np.int64)
        slices = [part for index in chosen.tolist() for part in self.sequences(index)]
        weights = [self.weights[part] for part in slices] if self.weights is not None else None
        joined = TokenSamples.from_lists([(self.ids[part], self.mask[part]) for part in slices], self.rows[chosen])
        return TokenSamples(
            ids=joined.ids, mask=joined.mask, starts=joined.starts, rows=joined.rows,
            sets=self.sets[chosen] if self.sets is not None else None, set_names=self.set_names,
            weights=np.concatenate([np.zeros(0, np.float32), *weights]) if weights is not None else None,
            labels=self.labels[chosen] if self.labels is not None else None,
            width=self.width, kind=self.kind, place=self.place,
        )  # fmt: skip
