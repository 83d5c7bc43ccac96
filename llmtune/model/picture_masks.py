"""Masks of models whose pictures see themselves in both directions (Gemma's), for documents that lie end to end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask


def mask_pictures_by_document(model: Any) -> None:
    """Let such a transformers model look for the pictures of each document of a flat batch where they are.

    transformers (5.24) looks for them in the mask of layers with a sliding window at a token's position in its own
    document, where the row's first document has its pictures. The mask without a window is right, and the other is
    that one as far as the window reaches.
    """
    backbone = model.base_model
    blocks = getattr(sys.modules[type(backbone).__module__], "get_block_sequence_ids_for_mask", None)
    if blocks is not None:
        backbone.register_forward_pre_hook(partial(_masked, blocks), with_kwargs=True)


def _masked(
    blocks: Callable[..., Any], module: Any, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    config = module.config.get_text_config()
    everywhere = config.use_bidirectional_attention != "vision"  # Gemma 3; of Gemma 4 the larger ones, in such layers
    kinds_1T = given.get("token_type_ids" if everywhere else "mm_token_type_ids")
    if given.get("cu_seq_lens_q") is None or kinds_1T is None or given.get("attention_mask") is not None:
        return None
    make = partial(
        create_causal_mask, config=config, attention_mask=None, cache=None, position_ids=given.get("position_ids"),
        inputs_embeds=torch.empty(*kinds_1T.shape, 1, dtype=module.dtype, device=kinds_1T.device),
    )  # fmt: skip
    seen = make(block_sequence_ids=blocks(kinds_1T, device=kinds_1T.device))
    if not isinstance(seen, torch.Tensor):
        return None
    at_T = torch.arange(kinds_1T.shape[1], device=seen.device)
    near_TT = at_T[None] > at_T[:, None] - config.sliding_window
    outside = False if seen.dtype == torch.bool else torch.finfo(seen.dtype).min
    masks = {
        "full_attention": seen if everywhere else make(),
        "sliding_attention": seen.masked_fill(~near_TT, outside),
    }
    return args, {**given, "attention_mask": masks}
