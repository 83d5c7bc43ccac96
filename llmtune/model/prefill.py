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


@torch.no_grad()
def prefilled(model: Any, prompts: Sequence[Sequence[int]], ids_BT: Tensor, real_BT: Tensor) -> DynamicCache | None:
    """The cache of all but the last token of each padded row, for `model.generate` to go on from; None for a model that
    keeps more of a prompt than keys and values. Eight answers to each prompt cost an eighth of reading the prompts.

    `ids_BT` (B, 2 or more) are the prompts padded on the left, `real_BT` 1 where a token is none of padding.
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
    cache.batch_select_indices(torch.tensor(number_B, device=ids_BT.device))
    return cache
