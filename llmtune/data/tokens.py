"""Tokenised samples in flat arrays, in memory or mapped from files: 5 bytes a token, no Python object a sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from llmtune.contract.examples import MEDIA_KINDS, ShownText
from llmtune.media.rows import COLUMNS

MEDIA_COLUMN = "llmtune.media"
"""The column in which a sample keeps the texts and the media of its sequences, where it shows any."""
CONTENT = ("ids", "mask", "weights", "starts", "stops", "labels", "column_hashes")
"""The arrays that training depends on: two runs that have them alike learn the same, wherever the files lie."""


def shown_in(row: Mapping[str, Any], width: int) -> list[ShownText]:
    """What each of the `width` sequences of a sample shows, by the columns that it keeps."""
    return [ShownText.read(held) for held in row.get(MEDIA_COLUMN, [None] * width)]


def told_columns(row: Mapping[str, Any], kinds: Sequence[str]) -> Mapping[str, Any]:
    """The columns of a sample as stages and rewards see them: of each of `kinds` of media one with the files that it
    shows, in their order."""
    if not kinds:
        return row
    shown, *_ = shown_in(row, 1)
    files = {COLUMNS[kind][0]: [each.path for each in shown.media if each.kind == kind] for kind in kinds}
    return {**{name: value for name, value in row.items() if name != MEDIA_COLUMN}, **files}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSamples:
    """Samples ready for training. A sample is `width` sequences: one, or two for a preference (chosen, rejected)."""

    ids: np.ndarray
    """(tokens,) int32, all sequences end to end."""
    mask: np.ndarray
    """(tokens,) bool, True where the token is trained. Never True for a sequence's first token."""
    starts: np.ndarray
    """(samples * width,) int64, where each sequence begins in `ids`."""
    stops: np.ndarray
    """(samples * width,) int64, where each sequence ends."""
    trained: np.ndarray
    """(samples * width,) int64, trained tokens of each sequence."""
    rows: np.ndarray
    """(samples,) int64, the row a sample comes from, counted over all data sets."""
    sets: np.ndarray | None = None
    """(samples,) int32, the number of its data set in `set_names`; None: all are of the first."""
    set_names: Sequence[str] = ("dataset",)
    weights: np.ndarray | None = None
    """(tokens,) float32, what a trained token counts; None: all count 1."""
    labels: np.ndarray | None = None
    """(samples,) bool, whether the answer is wanted, where rows are labelled so (KTO)."""
    columns: np.ndarray | None = None
    """(bytes,) uint8, a JSON object for each sample, end to end: the columns of its row that are not tokens; None where
    no sample has any."""
    column_stops: np.ndarray | None = None
    """(samples, 2) int64, where the object of each sample begins and ends in `columns`."""
    column_hashes: np.ndarray | None = None
    """(samples,) uint64, a hash of each object in which media are what their files hold, wherever those lie."""
    media: np.ndarray | None = None
    """(samples, kinds) int32, how many media of each of `MEDIA_KINDS` a sample shows; None where no sample has columns.
    """
    width: int = 1
    kind: str = "conversation"
    """`conversation` (also of text and tokens), `preference`, `labelled` or `prompt`."""
    counts: Literal["tokens", "samples"] | None = None
    """What the denominator of a step's loss counts, as the stage says; None: samples where they are no conversations.
    """
    place: Callable[[int], str] | None = field(default=None, repr=False)
    """Where a row stands: `path:line` or `path:row N`."""
    shows: Sequence[str] = ()
    """The kinds of media that other samples of the same data are known to show, of which these are a part."""
    precomputed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """(samples * width,) float32 each, what the stage has computed of the sequences before training."""
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
        bounds = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in sequences], out=bounds[1:])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in sequences)]).astype(np.int32)
        mask = np.concatenate([np.zeros(0, bool), *(mask for _, mask in sequences)]).astype(bool)
        mask[bounds[:-1][np.diff(bounds) > 0]] = False
        trained = np.diff(np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[bounds])
        return TokenSamples(
            ids=ids,
            mask=mask,
            starts=bounds[:-1],
            stops=bounds[1:],
            trained=trained,
            rows=np.asarray(rows, dtype=np.int64),
            place=origins.__getitem__ if origins else None,
            **more,
        )

    @staticmethod
    def concatenated(parts: Sequence[TokenSamples], rows_before: Sequence[int] = (), **more: Any) -> TokenSamples:
        """The samples of all `parts`, which are of one kind; `rows_before[i]` rows stand before those of part i (0)."""
        parts = parts or [TokenSamples.from_lists([], [])]
        counts = [len(part.ids) for part in parts]
        shifts = np.repeat(np.cumsum(counts) - counts, [len(part.starts) for part in parts])
        rows = np.repeat(rows_before or [0], [len(part) for part in parts] if rows_before else 1)
        weights = labels = columns = column_stops = column_hashes = media = None
        if any(part.weights is not None for part in parts):
            filled = [np.ones(len(p.ids), np.float32) if p.weights is None else p.weights for p in parts]
            weights = np.concatenate(filled)
        if any(part.labels is not None for part in parts):
            labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        if any(part.columns is not None for part in parts):
            held: list[Any] = [part for part in parts if part.columns is not None]
            sizes = [len(part.columns) for part in held]
            before = (np.cumsum(sizes) - sizes).tolist()
            columns, column_hashes, media = (
                np.concatenate([vars(part)[name] for part in held]) for name in ("columns", "column_hashes", "media")
            )
            column_stops = np.concatenate([part.column_stops + n for part, n in zip(held, before, strict=True)])
        return replace(
            parts[0],
            ids=np.concatenate([part.ids for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            starts=np.concatenate([part.starts for part in parts]) + shifts,
            stops=np.concatenate([part.stops for part in parts]) + shifts,
            trained=np.concatenate([part.trained for part in parts]),
            rows=np.concatenate([part.rows for part in parts]) + rows,
            sets=np.concatenate([np.zeros(len(p), np.int32) if p.sets is None else p.sets for p in parts]),
            weights=weights,
            labels=labels,
            columns=columns,
            precomputed={},
            column_stops=column_stops,
            column_hashes=column_hashes,
            media=media,
            width=max((part.width for part in parts if len(part)), default=1),
            digest="",
            **more,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts_samples(self) -> bool:
        """Whether a batch weighs as much as it has samples, not as much as its targets."""
        return self.kind != "conversation" if self.counts is None else self.counts == "samples"

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each sample, all its sequences."""
        return (self.stops - self.starts).reshape(-1, self.width).sum(1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.stops - self.starts).max()) if len(self) else 0

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return int((self.stops - self.starts).sum())

    @property
    def supervised(self) -> np.ndarray:
        """(samples,) trained tokens of each sample."""
        return self.trained.reshape(-1, self.width).sum(1)

    def sequences(self, index: int) -> list[slice]:
        """Where the sequences of one sample stand in `ids`, `mask` and `weights`."""
        return [
            slice(int(self.starts[at]), int(self.stops[at]))
            for at in range(index * self.width, (index + 1) * self.width)
        ]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of one sample of one sequence, as views."""
        (part,) = self.sequences(index)
        return self.ids[part], self.mask[part]

    def row(self, index: int) -> Mapping[str, Any]:
        """What was kept of a sample's row besides tokens: its columns, and what it shows."""
        if self.columns is None or self.column_stops is None:
            return {}
        start, stop = self.column_stops[index].tolist()
        return json.loads(self.columns[start:stop].tobytes())

    def columns_of(self, index: int) -> Mapping[str, Any]:
        """The columns of a sample as stages and rewards see them."""
        return told_columns(self.row(index), self.media_kinds)

    @cached_property
    def media_count(self) -> Counter[str]:
        """How many media samples show, by their kind: one that two sequences of a sample show counts twice."""
        if self.media is None:
            return Counter()
        counts = zip(MEDIA_KINDS, self.media.sum(0).tolist(), strict=True)
        return Counter({kind: count for kind, count in counts if count})

    @cached_property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that samples show."""
        shown = {*self.shows, *self.media_count}
        return tuple(kind for kind in MEDIA_KINDS if kind in shown)

    def shown(self, index: int) -> list[ShownText]:
        """What each sequence of a sample shows; nothing where the sample shows no media."""
        return shown_in(self.row(index), self.width)

    def kinds_shown(self, index: int) -> set[str]:
        """The kinds of media that a sample shows."""
        counts = [0] * len(MEDIA_KINDS) if self.media is None else self.media[index].tolist()
        return {kind for kind, count in zip(MEDIA_KINDS, counts, strict=True) if count}

    def media_names(self, index: int) -> list[str]:
        """The names of the files that a sample shows, each once."""
        paths = [medium.path for one in self.shown(index) for medium in one.media]
        first = [path if isinstance(path, str) else path[0] for path in paths]
        return list(dict.fromkeys(path.rpartition("/")[2] for path in first))

    def pictures(self, index: int) -> list[str]:
        """The files of the pictures that a sample shows, each once."""
        media = [medium for one in self.shown(index) for medium in one.media]
        return list(dict.fromkeys(str(medium.path) for medium in media if medium.kind == "image"))

    def set_of(self, index: int) -> int:
        """The number of the data set that a sample comes from."""
        return int(self.sets[index]) if self.sets is not None else 0

    def by_set(self) -> dict[str, np.ndarray]:
        """The samples of each data set that has any, by its name; a name that several have gets a number."""
        found: dict[str, np.ndarray] = {}
        for number, name in enumerate(self.set_names):
            chosen = np.arange(len(self)) if self.sets is None else np.flatnonzero(self.sets == number)
            if len(chosen):
                found[name if name not in found else f"{name}_{number + 1}"] = chosen
        return found

    def origin(self, index: int) -> str:
        """Where the sample comes from: `path:line` or `path:row N`."""
        row = int(self.rows[index])
        return self.place(row) if self.place is not None else f"row {row}"

    def hashed(self) -> str:
        """SHA-256 of what training depends on."""
        digest = hashlib.sha256()
        for name in CONTENT:
            array = vars(self)[name]
            digest.update(b"" if array is None else array.tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenSamples:
        """The given samples in the given order, some maybe twice; tokens stay where they are."""
        chosen = np.asarray(indices, dtype=np.int64)
        parts = (chosen[:, None] * self.width + np.arange(self.width)).reshape(-1)
        return replace(
            self,
            starts=self.starts[parts],
            stops=self.stops[parts],
            trained=self.trained[parts],
            rows=self.rows[chosen],
            sets=self.sets[chosen] if self.sets is not None else None,
            labels=self.labels[chosen] if self.labels is not None else None,
            column_stops=self.column_stops[chosen] if self.column_stops is not None else None,
            column_hashes=self.column_hashes[chosen] if self.column_hashes is not None else None,
            media=self.media[chosen] if self.media is not None else None,
            precomputed={name: values[parts] for name, values in self.precomputed.items()},
            digest=hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest() if self.digest else "",
        )
