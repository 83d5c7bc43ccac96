"""Token samples become the tensors of one micro-batch."""

# B rows · T tokens of a row · N tokens that count

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmtune.stages import Batch

IGNORED = -100
"""Label of a token that does not count."""


def collate(
    samples: Sequence[tuple[np.ndarray, np.ndarray]], *, flat: bool, pad_id: int, sample_ids: Sequence[int] = ()
) -> Batch:
    """Lay (ids, mask) samples out as one batch on the CPU.

    Flat: one row, documents end to end. Padded: one row a sample, padded on the right. Without samples the batch is
    one row of two padding tokens with weight 0, so that a rank without rows can still take part in collectives.
    """
    if not samples:
        samples = [(np.full(2, pad_id, dtype=np.int64), np.zeros(2, dtype=bool))]
        sample_ids = ()
    rows = [(ids.astype(np.int64), _labels(ids, mask)) for ids, mask in samples]
    return _flat(rows, tuple(sample_ids)) if flat else _padded(rows, pad_id, tuple(sample_ids))


def _labels(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    labels = np.where(mask, ids, IGNORED).astype(np.int64)
    labels[:1] = IGNORED  # nothing of its own document stands before a first token
    return labels


def _flat(rows: list[tuple[np.ndarray, np.ndarray]], sample_ids: tuple[int, ...]) -> Batch:
    lengths = [len(ids) for ids, _ in rows]
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return _batch(
        np.concatenate([ids for ids, _ in rows])[None],
        np.concatenate([labels for _, labels in rows])[None],
        sample_ids,
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]),
        document_starts=torch.from_numpy(starts),
        longest_document=max(lengths),
    )


def _padded(rows: list[tuple[np.ndarray, np.ndarray]], pad_id: int, sample_ids: tuple[int, ...]) -> Batch:
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    ids_BT, labels_BT = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    attention_mask_BT = np.zeros(shape, dtype=np.int64)
    for row, (ids, labels) in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
        labels_BT[row, : len(ids)] = labels
        attention_mask_BT[row, : len(ids)] = 1
    return _batch(ids_BT, labels_BT, sample_ids, attention_mask=torch.from_numpy(attention_mask_BT))


def _batch(ids_BT: np.ndarray, labels_BT: np.ndarray, sample_ids: tuple[int, ...], **layout: object) -> Batch:
    # The first label of every document is ignored, so the position before a label is in the same document.
    (counted_N,) = np.nonzero(labels_BT.reshape(-1) != IGNORED)
    return Batch(
        input_ids=torch.from_numpy(ids_BT),
        labels=torch.from_numpy(labels_BT),
        weight=float(len(counted_N)),
        predict_at=torch.from_numpy(counted_N - 1),
        targets=torch.from_numpy(labels_BT.reshape(-1)[counted_N]),
        sample_ids=sample_ids,
        **layout,  # type: ignore[arg-type]
    )
