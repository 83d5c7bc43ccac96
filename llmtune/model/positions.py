"""Positions in three dimensions (M-RoPE: time, height, width) of documents that lie end to end in one row."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def count_positions_by_document(model: Any) -> None:
    """Let a transformers model whose pictures have positions in height and width count them for each document.

    Its own `get_rope_index` counts over whole rows. Here it is asked for each document of a flat batch, and the model
    gets what it takes for a packed row: positions of the text, which tell where documents begin, then those three.
    """
    for module in counting_modules(model):
        module.register_forward_pre_hook(_counted, with_kwargs=True)


def counting_modules(model: Any) -> list[Any]:
    """The modules whose `get_rope_index` can be asked: it has to take each token's kind of medium."""
    asked = [(module, getattr(module, "get_rope_index", None)) for module in model.modules()]
    return [
        module
        for module, counts in asked
        if counts is not None and "mm_token_type_ids" in inspect.signature(counts).parameters
    ]


def _counted(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    text_1T, starts = given.get("position_ids"), given.get("cu_seq_lens_q")
    if starts is None or text_1T is None or text_1T.ndim != 2:
        return None
    kinds_1T = given.get("mm_token_type_ids")
    if kinds_1T is None:  # no document shows anything
        return args, {**given, "position_ids": text_1T.expand(4, -1, -1)}
    lengths = starts.diff().tolist()
    ids_DT, kinds_DT, there_DT = (
        pad_sequence(list(row_1T[0].split(lengths)), batch_first=True)
        for row_1T in (given["input_ids"], kinds_1T, torch.ones_like(text_1T))
    )
    grids = {name: given[name] for name in _GRIDS if given.get(name) is not None}
    positions_3DT, _ = module.get_rope_index(ids_DT, mm_token_type_ids=kinds_DT, attention_mask=there_DT, **grids)
    positions_31T = positions_3DT[:, there_DT.bool()][:, None]
    return args, {**given, "position_ids": torch.cat([text_1T[None], positions_31T])}
