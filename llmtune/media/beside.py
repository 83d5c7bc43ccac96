"""Rows that a processor was asked about one by one become those of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError
from llmtune.contract.examples import PER_TOKEN

if TYPE_CHECKING:
    from torch import Tensor


def beside(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One answer of a processor from its answers for single rows: numbers of tokens in a row for each text, and what is
    made of media one after the other. Where there is a mask of it, what is smaller is filled up with zeros, as the
    processor does; DataError where there is none."""
    import torch

    width = max(row["input_ids"].shape[1] for row in made)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in made for name in row if isinstance(row[name], torch.Tensor)):
        own = [row[name] for row in made if name in row]
        if name in PER_TOKEN:
            size = (width, *own[0].shape[2:])
            found[name] = torch.cat([_filled(row.get(name, own[0].new_zeros(1, 1, *size[1:])), size) for row in made])
            continue
        sizes = {tuple(value.shape[1:]) for value in own}
        if len(sizes) > 1 and not any("mask" in other for row in made for other in row if other not in PER_TOKEN):
            raise DataError(
                f"rows of one batch show videos of several lengths, whose {name} cannot lie beside each other for this "
                "model; set per_device_train_batch_size: 1 and packing: false (and per_device_eval_batch_size: 1)"
            )
        found[name] = torch.cat([_filled(value, [max(size) for size in zip(*sizes, strict=True)]) for value in own])
    return found


def _filled(value: Tensor, size: Sequence[int]) -> Tensor:
    """The tensor with zeros at the ends of its dimensions but the first, up to `size`."""
    import torch

    if tuple(value.shape[1:]) == tuple(size):
        return value
    more = [end for have, want in zip(value.shape[1:], size, strict=True) for end in (want - have, 0)]
    return torch.nn.functional.pad(value, more[::-1])


def in_places(value_BT: Tensor, places: Sequence[int], count: int, absent: Tensor | None = None) -> Tensor:
    """The rows of `value_BT` at their places among `count`; the others have `absent` everywhere, or zeros."""
    found = value_BT.new_zeros(count, *value_BT.shape[1:])
    if absent is not None:
        found[:] = absent
    found[places] = value_BT
    return found
