"""Token samples become the tensors of one micro-batch."""

# B rows · T tokens of a row · N tokens that count

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.contract.examples import PER_TOKEN
from llmtune.contract.stages import Batch
from llmtune.data.sequence import TokenSequence

if TYPE_CHECKING:
    from llmtune.distributed.ranks import Ranks

IGNORED = -100
"""Label of a token that does not count."""


def collate(
    documents: Sequence[TokenSequence] | Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    flat: bool,
    pad_id: int,
    sample_ids: Sequence[int] = (),
    width: int = 1,
    desirable: Sequence[bool] | None = None,
    counts_samples: bool = False,
    fillers: Sequence[TokenSequence] = (),
) -> Batch:
    """Lay documents out as one batch on the CPU.

    Flat: one row, documents end to end. Padded: one row a document, padded on the right. Without documents the batch is
    one row of two padding tokens with weight 0, so that a rank without rows can still take part in collectives.

    Args:
        width: documents of a sample.
        desirable: whether each document is an answer to learn or to avoid (KTO).
        counts_samples: the batch weighs as much as it has samples, not as much as its tokens that count.
        fillers: documents after the others that are no samples and from which nothing is learnt.
    """
    rows = [each if isinstance(each, TokenSequence) else TokenSequence(*each) for each in documents]
    sequences = len(rows)
    rows = [*rows, *fillers] or [TokenSequence(np.full(2, pad_id, dtype=np.int64), np.zeros(2, dtype=bool))]
    labels = [_labels(row) for row in rows]
    batch = _flat(rows, labels) if flat else _padded(rows, labels, pad_id)
    batch.sample_ids = tuple(sample_ids) if sequences else ()
    batch.sequences = sequences
    batch.desirable = torch.tensor(desirable, dtype=torch.bool) if desirable is not None and sequences else None
    counted = [label != IGNORED for label in labels]
    batch.target_sequence = torch.from_numpy(np.repeat(np.arange(len(rows)), [int(each.sum()) for each in counted]))
    batch.weight_groups = _weight_groups(rows, counted)
    batch.weight = float(sequences // width) if counts_samples else target_weight(batch)
    return batch


def target_weight(batch: Batch) -> float:
    """Sum of the weights of the batch's targets."""
    if not batch.weight_groups:
        return float(len(batch.targets))
    return sum(weight * len(spots) for weight, spots in batch.weight_groups)


def _labels(row: TokenSequence) -> np.ndarray:
    mask = row.mask if row.weights is None else row.mask & (row.weights > 0)
    labels = np.where(mask, row.ids, IGNORED).astype(np.int64)
    labels[:1] = IGNORED  # nothing of its own document stands before a first token
    return labels


def _weight_groups(
    rows: Sequence[TokenSequence], counted: Sequence[np.ndarray]
) -> tuple[tuple[float, torch.Tensor], ...]:
    if all(row.weights is None for row in rows):
        return ()
    weights_N = np.concatenate([row.all_weights[each] for row, each in zip(rows, counted, strict=True)])
    distinct = np.unique(weights_N)
    if distinct.tolist() in ([], [1.0]):
        return ()
    return tuple((float(weight), torch.from_numpy(np.flatnonzero(weights_N == weight))) for weight in distinct)


def _flat(rows: list[TokenSequence], labels: list[np.ndarray]) -> Batch:
    lengths = [len(row.ids) for row in rows]
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return _batch(
        np.concatenate([row.ids for row in rows]).astype(np.int64)[None],
        np.concatenate(labels)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]),
        document_starts=torch.from_numpy(starts),
        longest_document=max(lengths),
    )


def _padded(rows: list[TokenSequence], labels: list[np.ndarray], pad_id: int) -> Batch:
    lengths = [len(row.ids) for row in rows]
    shape = (len(rows), max(lengths))
    ids_BT, labels_BT = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        ids_BT[number, : len(label)] = row.ids
        labels_BT[number, : len(label)] = label
    # Rows of one length need no mask, and attention without one is faster.
    mask_BT = np.arange(shape[1]) < np.array(lengths)[:, None]
    layout = {} if mask_BT.all() else {"attention_mask": torch.from_numpy(mask_BT.astype(np.int64))}
    return _batch(ids_BT, labels_BT, **layout)


def _batch(ids_BT: np.ndarray, labels_BT: np.ndarray, **layout: object) -> Batch:
    # The first label of every document is ignored, so the position before a label is in the same document.
    (counted_N,) = np.nonzero(labels_BT.reshape(-1) != IGNORED)
    return Batch(
        input_ids=torch.from_numpy(ids_BT),
        labels=torch.from_numpy(labels_BT),
        weight=0.0,
        predict_at=torch.from_numpy(counted_N - 1),
        targets=torch.from_numpy(labels_BT.reshape(-1)[counted_N]),
        **layout,  # type: ignore[arg-type]
    )


def split_row(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's piece of a flat batch, or the batch itself where rows are not split.

    Positions and document bounds stay those of the whole row. A row that R does not divide gets a last document of
    padding, up to R - 1 tokens that no other document sees and no loss counts. Of a row that shows media all ranks keep
    all inputs, as the model has to know every place that media have.
    """
    size, rank = ranks.dims.context, ranks.context_rank
    if size == 1:
        return batch
    assert batch.position_ids is not None and batch.document_starts is not None, "only flat rows can be split"
    length = batch.input_ids.shape[1]
    fill = -length % size
    piece = (length + fill) // size
    start, stop = rank * piece, (rank + 1) * piece
    # The position of a target may lie at the end of one piece and its token at the start of the next.
    mine = (batch.predict_at >= start) & (batch.predict_at < stop)
    last = batch.document_starts.new_tensor([length + fill] if fill else [])
    targets = batch.targets[mine]
    assert batch.target_sequence is not None
    groups = _groups(batch, mine)
    ids, places = _filled(batch.input_ids, torch.zeros(fill)), _filled(batch.position_ids, torch.arange(fill))
    return replace(
        batch,
        input_ids=ids[:, start:stop],
        labels=_filled(batch.labels, torch.full((fill,), -100))[:, start:stop],
        position_ids=places[:, start:stop],
        row_inputs={"input_ids": ids, "position_ids": places} if batch.media else {},
        piece_start=start,
        media={
            name: _filled(value, value.new_zeros(fill, *value.shape[2:])) if name in PER_TOKEN else value
            for name, value in batch.media.items()
        },
        document_starts=torch.cat([batch.document_starts, last]),
        longest_document=max(batch.longest_document, fill),
        predict_at=batch.predict_at[mine] - start,
        targets=targets,
        target_sequence=batch.target_sequence[mine],
        weight_groups=groups,
        weight=sum(weight * len(spots) for weight, spots in groups) if batch.weight_groups else float(len(targets)),
        row_tokens=length + fill,
    )


def _groups(batch: Batch, mine: torch.Tensor) -> tuple[tuple[float, torch.Tensor], ...]:
    """The weight groups of a piece: `mine` (N,) says which of the batch's targets are in it."""
    number = mine.cumsum(0) - 1
    kept = ((weight, number[spots[mine[spots]]]) for weight, spots in batch.weight_groups)
    return tuple((weight, spots) for weight, spots in kept if len(spots))


def _filled(row_1T: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    return torch.cat([row_1T, end.to(row_1T)[None]], 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    changes: dict[str, Any] = {
        name: moved(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }
    if batch.mismatched is not None:
        changes["mismatched"] = to_device(batch.mismatched, device)
    changes["extra"] = {name: moved(value) for name, value in batch.extra.items()}
    changes["media"] = {name: moved(value) for name, value in batch.media.items()}
    changes["row_inputs"] = {name: moved(value) for name, value in batch.row_inputs.items()}
    changes["weight_groups"] = tuple((weight, moved(spots)) for weight, spots in batch.weight_groups)
    return replace(batch, **changes)
