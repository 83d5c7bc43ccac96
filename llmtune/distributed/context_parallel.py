"""Context parallelism: neighbouring ranks share the rows of a batch, each computing one piece of every row.

All of a transformer but attention treats tokens one by one, so a rank computes its piece alone. Around attention two
all-to-alls exchange pieces of the row with all heads for the whole row with some of the heads and back (DeepSpeed-
Ulysses, Jacobs et al. 2023, https://arxiv.org/abs/2309.14509). The attention function in between sees what it would
see on one rank, document bounds and windows included, so nothing about it has to be written twice.

torch's own ring attention (`torch.distributed.tensor.experimental.context_parallel`) knows neither document bounds nor
windows, and has no CPU.

Shapes: R ranks of a group, T tokens of a row, P = T / R of a piece, H query or key-value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.contract.errors import PlanError
from llmtune.contract.structure import language_model

if TYPE_CHECKING:
    from llmtune.contract.records import ParallelDims

Attention = Callable[..., tuple[Tensor, Any]]


def attend_over_ranks(model: Any, dims: ParallelDims, device: torch.device) -> None:
    """Let the model's attention exchange pieces of rows between the ranks of a group. Collective."""
    sizes = (dims.replicate * dims.shard, dims.context, dims.tensor)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("batch", "context", "tensor"))
    language = language_model(model)
    inner = language.config._attn_implementation
    name = f"llmtune_context_{inner}"
    AttentionInterface.register(name, over_ranks(ALL_ATTENTION_FUNCTIONS[inner], mesh["context"].get_group()))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    language.set_attn_implementation(name)
    split_embeddings(model)


def split_embeddings(model: Any) -> None:
    """Let a model that puts media into embeddings do so for whole rows, of which its language model then gets this
    rank's piece. Rows without media are pieces already when they come."""
    language, base = language_model(model), model.base_model
    if language is model or language is base:
        return
    piece: dict[str, Any] = {}

    def whole(module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep what attention asks for from towers, which see all of their pictures."""
        piece.clear()
        if "context_piece" in inputs:
            piece.update({name: inputs.pop(name) for name in ("context_piece", "context_row_tokens")})
        return args, inputs

    def cut(module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not piece:
            return args, inputs
        start, stop = piece["context_piece"]
        own = {name: inputs[name].narrow(dim, start, stop - start) for name, dim in _BY_TOKEN.items()}
        return args, {**inputs, **own, "context_row_tokens": piece["context_row_tokens"]}

    base.register_forward_pre_hook(whole, with_kwargs=True)
    language.register_forward_pre_hook(cut, with_kwargs=True)


_BY_TOKEN = {"inputs_embeds": 1, "position_ids": -1}
"""What a language model is given for each token, and the dimension of the tokens."""


def over_ranks(inner: Attention, group: dist.ProcessGroup) -> Attention:
    """`inner`, which attends over whole rows, for ranks that hold pieces of them.

    Called for a row that is not split (generation, checks), it is `inner`.
    """
    size = group.size()

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Any]:
        if not arguments.pop("context_row_tokens", 0):
            return inner(module, query, key, value, attention_mask, **arguments)
        arguments["sliding_window"] = _window(module, arguments)
        rows = _to_rows(_same_heads(query, key, value, size), group, size)
        output_1THD, weights = inner(module, *rows, None, **arguments)
        return _to_pieces(output_1THD, group, size), weights

    return attention


def _window(module: Any, arguments: dict[str, Any]) -> int | None:
    """The layer's window. Some models (Qwen2-MoE) put it into the mask alone, and a piece has no mask."""
    window, config = arguments.get("sliding_window"), getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if window is None and types and index is not None and types[index] == "sliding_attention":
        return getattr(config, "sliding_window", None)
    return window


def _same_heads(query: Tensor, key: Tensor, value: Tensor, size: int) -> list[Tensor]:
    """Key-value heads repeated as often as it takes to give every rank the same number of them."""
    if query.shape[1] % size:
        raise PlanError(f"cp_size: {size} ranks cannot share a layer's {query.shape[1]} attention heads equally")
    heads = key.shape[1]
    repeats = math.lcm(heads, size) // heads
    found = [query, key, value]
    if repeats > 1:
        found[1:] = [tensor.repeat_interleave(repeats, 1) for tensor in (key, value)]
    if torch.is_autocast_enabled(query.device.type):  # attention would cast them anyway: half the bytes to send
        dtype = torch.get_autocast_dtype(query.device.type)
        found = [tensor.to(dtype) for tensor in found]
    return found


def _to_rows(pieces_1HPD: Sequence[Tensor], group: dist.ProcessGroup, size: int) -> list[Tensor]:
    """(1, H, P, D) each to (1, H / R, T, D), in one exchange."""
    sent_RX = torch.cat([piece[0].reshape(size, -1) for piece in pieces_1HPD], 1)
    got_RX = Exchange.apply(sent_RX, group)
    rows = []
    for piece, part_RX in zip(pieces_1HPD, got_RX.split([p.numel() // size for p in pieces_1HPD], 1), strict=True):
        _, heads, length, width = piece.shape
        part_RHPD = part_RX.view(size, heads // size, length, width)
        rows.append(part_RHPD.transpose(0, 1).reshape(1, heads // size, size * length, width))
    return rows


def _to_pieces(row_1THD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """(1, T, H / R, D) to (1, P, H, D)."""
    _, tokens, heads, width = row_1THD.shape
    got = Exchange.apply(row_1THD.reshape(size, -1), group)
    return got.view(size, tokens // size, heads, width).transpose(0, 1).reshape(1, tokens // size, size * heads, width)


class Exchange(torch.autograd.Function):
    """Row r of (R, X) goes to rank r, which gets the rows that are meant for it in the order of their senders.

    It is its own transpose, so gradients travel back by the same exchange.
    """

    @staticmethod
    def forward(ctx: Any, sent_RX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        sent_RX = sent_RX.contiguous()
        got_RX = torch.empty_like(sent_RX)
        dist.all_to_all_single(got_RX, sent_RX, group=group)
        return got_RX

    @staticmethod
    def backward(ctx: Any, gradient_RX: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return Exchange.apply(gradient_RX, ctx.group), None
