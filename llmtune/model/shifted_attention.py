"""Shifted sparse attention (S²-Attn) of LongLoRA, https://arxiv.org/abs/2309.12307, section 3.2: training on long rows
in groups of them.

The first half of the heads attends within groups of G positions, the other half within groups that lie G/2 positions
further, so that what one group knows reaches the next. At the ends half groups remain: the authors' code joins them,
which lets the first tokens see the last ones; their paper says that a mask prevents it, and here they stay apart.

Used while the model trains; evaluating and answering attend to everything. Shapes: B rows, H heads, T positions, D
width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtune.contract.structure import language_model

GROUPS = 4
"""Of a row of `cutoff_len` tokens, as in the paper."""


def shift_attention(model: Any, cutoff_len: int) -> str:
    """Let the model train with groups of a fourth of `cutoff_len`; returns the name of its attention function.

    The size does not follow the rows of a batch, so that what is learnt does not depend on which rows lie together.
    """
    group = 2 * -(-cutoff_len // (2 * GROUPS))
    name = f"llmtune_shifted_{group}"
    AttentionInterface.register(name, partial(shifted_attention, group))
    AttentionMaskInterface.register(name, sdpa_mask)
    language_model(model).set_attn_implementation(name)
    return name


def shifted_attention(
    group: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention function for `AttentionInterface`: (B, H, T, D) queries to (B, T, H, D).

    Rows are padded on the right, where no token that counts looks, so that `mask` is not needed while training.
    """
    if not module.training:
        return sdpa_attention_forward(module, query, key, value, mask, **arguments)
    heads, length = query.shape[1], query.shape[2]
    shared = heads // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    query, key, value = (F.pad(tensor, (0, 0, 0, -length % group)) for tensor in (query, key, value))
    attend = partial(_in_groups, dropout=arguments.get("dropout", 0.0), scale=arguments.get("scaling"))
    plain, moved = ([tensor[:, part] for tensor in (query, key, value)] for part in _halves(heads))
    straight, half, end = attend(plain, group), group // 2, query.shape[2] - group // 2
    ends = attend([_join(tensor[:, :, :half], tensor[:, :, end:]) for tensor in moved], half)
    middle = [tensor[:, :, half:end] for tensor in moved]
    between = attend(middle, group) if end > half else middle[2]
    shifted = _join(ends[:, :, :half], between, ends[:, :, half:])
    return _join(straight, shifted, dim=1)[:, :, :length].transpose(1, 2), None


def _halves(heads: int) -> tuple[slice, slice]:
    return slice(0, heads // 2), slice(heads // 2, heads)


def _join(*tensors: Tensor, dim: int = 2) -> Tensor:
    return torch.cat(tensors, dim)


def _in_groups(states: list[Tensor], group: int, dropout: float, scale: float | None) -> Tensor:
    """Causal attention (B, H, T, D) within each `group` positions."""
    rows, heads, length, _ = states[0].shape
    cut = [s.unflatten(2, (-1, group)).transpose(1, 2).reshape(-1, heads, group, s.shape[-1]) for s in states]
    found = F.scaled_dot_product_attention(*cut, dropout_p=dropout, is_causal=True, scale=scale)
    return found.reshape(rows, length // group, heads, group, -1).transpose(1, 2).flatten(2, 3)
