"""Keys and values of prompts, computed once for answers to the same prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from llmtune.model.prompts import PromptBatch, positions, read_but_last, reads_anew

if TYPE_CHECKING:
    from torch import Tensor


CACHE = "cache" if ALL_CACHE_NAMES[0] == "cache" else "past_key_values"
"""What `generate` calls the keys and values that it goes on from."""


class ReservedLayer(DynamicLayer):
    """Keys and values with room for an answer: a token is written into it, where else all would be copied for it."""

    def __init__(self, keys: Tensor, values: Tensor, rows_B: Tensor, more: int) -> None:
        """Rows of `keys` and `values`, each as often as `rows_B` names it, and room for `more` tokens."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room_keys, self.room_values = (_with_room(held, rows_B, more) for held in (keys, values))
        self._show(keys.shape[-2])

    def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values = self.room_keys[:, :, :tokens], self.room_values[:, :, :tokens]
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of tokens; all so far."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        moved = self.keys is None or self.keys.data_ptr() != self.room_keys.data_ptr()
        if moved or stop > self.room_keys.shape[-2]:  # others have picked rows, or the room is full
            return super().update(key_states, value_states)
        self.room_keys[:, :, start:stop], self.room_values[:, :, start:stop] = key_states, value_states
        return self._show(stop)


def _with_room(held: Tensor, rows_B: Tensor, more: int) -> Tensor:
    rows, (_, heads, tokens, width) = len(rows_B), held.shape
    room = held.new_empty(rows, heads, tokens + more, width)
    room[:, :, :tokens] = held.index_select(0, rows_B)
    return room


@torch.no_grad()
def prefilled(model: Any, once: PromptBatch, number_B: Tensor, answer_tokens: int) -> dict[str, Any]:
    """What `model.generate` goes on from where all but the last token of each prompt has been read: a cache, and the
    rows' positions where they are not what it would make them; nothing for a model that keeps more of a prompt than
    keys and values. Eight answers to each prompt cost an eighth of reading the prompts.

    `number_B` are the rows' prompts in `once`, which have 2 tokens or more, padding included; `answer_tokens` are the
    most that will follow.
    """
    if model._is_stateful or reads_anew(once.tensors):
        return {}
    read, moved_U = read_but_last(model, once)
    cache = read.get("cache", read.get("past_key_values"))
    if not isinstance(cache, DynamicCache) or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        return {}
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.batch_select_indices(number_B)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            cache.layers[at] = ReservedLayer(layer.keys, layer.values, number_B, answer_tokens + 1)
    if not hasattr(model.base_model, "rope_deltas"):
        return {CACHE: cache}
    return {CACHE: cache, "position_ids": positions(once.real_BT[number_B], moved_U[number_B])}
