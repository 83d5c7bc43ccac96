"""Keys and values of prompts, computed once for answers to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

if TYPE_CHECKING:
    from torch import Tensor


def repeated(prompts: Sequence[Sequence[int]]) -> bool:
    """Whether some prompts are the same."""
    return len({tuple(prompt) for prompt in prompts}) < len(prompts)


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
def prefilled(
    model: Any, prompts: Sequence[Sequence[int]], ids_BT: Tensor, real_BT: Tensor, answer_tokens: int
) -> DynamicCache | None:
    """The cache of all but the last token of each padded row, for `model.generate` to go on from; None for a model that
    keeps more of a prompt than keys and values. Eight answers to each prompt cost an eighth of reading the prompts.

    `ids_BT` (B, 2 or more) are the prompts padded on the left, `real_BT` 1 where a token is none of padding, and
    `answer_tokens` the most that will follow.
    """
    config = model.config.get_text_config()
    if model._is_stateful or "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return None
    spots: dict[tuple[int, ...], int] = {}
    number_B = [spots.setdefault(tuple(prompt), len(spots)) for prompt in prompts]
    firsts = torch.tensor([number_B.index(number) for number in range(len(spots))], device=ids_BT.device)
    real_UT = real_BT.index_select(0, firsts)
    read = model.base_model(
        input_ids=ids_BT.index_select(0, firsts)[:, :-1], attention_mask=real_UT[:, :-1],
        position_ids=(real_UT.cumsum(1) - 1).clamp(min=0)[:, :-1], use_cache=True,
    )  # fmt: skip
    cache = read.get("cache", read.get("past_key_values"))
    if not isinstance(cache, DynamicCache) or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        return None
    rows_B = torch.tensor(number_B, device=ids_BT.device)
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.batch_select_indices(rows_B)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            cache.layers[at] = ReservedLayer(layer.keys, layer.values, rows_B, answer_tokens + 1)
    return cache
