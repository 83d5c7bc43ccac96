"""Attention inside each document of a flat batch, without a mask over the batch.

A flat batch lays documents end to end in one row and gives their bounds as `cu_seq_lens_q`, which transformers hands
down to the attention function. transformers' own `sdpa` finds the documents in the position ids instead, builds a
(T, T) mask and computes all T * T scores: at T = 2162 with 10 documents on a CPU 9 times the work of attending within
each document, which is what happens here. Without bounds (padded batches, generation) everything is transformers'
`sdpa`, called with what it would have got.

Shapes: T tokens of the batch, L of one document, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtune import ModelEdit, RunContext, language_model
from llmtune_kernels.spec import KernelSpec

NAME = "llmtune_packed"

Varlen = Callable[..., Tensor]
"""`f(query_THD, key_TKD, value_TKD, starts, longest, scale, window) -> (T, H, D)`."""

_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Document lengths of a bounds tensor, so that a GPU is waited for once a batch and not once a layer."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention function for `AttentionInterface`: (1, H, T, D) queries to (1, T, H, D)."""
    starts, window = arguments.get("cu_seq_lens_q"), arguments.get("sliding_window")
    if window is None:
        window = getattr(attention_mask, "llmtune_window", None)
    # A model that says nothing of a window but built a mask for a single document may have one in the mask alone.
    masked = attention_mask is not None and window is None and not _is_stand_in(attention_mask)
    if starts is None or masked or not _is_flat(module, query, key, arguments):
        return sdpa_attention_forward(module, query, key, value, _real_mask(attention_mask), **arguments)
    scale = arguments.get("scaling")
    dropout = arguments.get("dropout", 0.0)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    width = query.shape[-1]
    # The kernels take 16-bit types and widths in steps of 8, and torch's has no dropout.
    fits = query.is_cuda and dtype in (torch.bfloat16, torch.float16) and not dropout
    if fits and width == value.shape[-1] <= 256 and width % 8 == 0 and (found := _varlen()):
        query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        longest = arguments.get("max_length_q") or max(_documents(starts))
        return found[1](query, key, value, starts, int(longest), scale, window).unsqueeze(0), None
    return _document_by_document(query, key, value, _documents(starts), scale, window, dropout), None


def _is_flat(module: nn.Module, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> bool:
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unusual = any(arguments.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))
    return query.shape[0] == 1 and query.shape[2] == key.shape[2] and bool(causal) and not unusual


def _documents(starts: Tensor) -> list[int]:
    if starts not in _lengths:
        _lengths[starts] = [length for length in starts.diff().tolist() if length]
    return _lengths[starts]


def _document_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """(1, T, H, D). `split` and `cat` rather than slices: the gradient of a slice is a tensor of full length."""
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"the document bounds cover {sum(lengths)} tokens, and the batch has {query.shape[2]}")
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    attend = functools.partial(
        F.scaled_dot_product_attention,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    outputs = []
    for query_L, key_L, value_L in pieces:
        if window is None or query_L.shape[2] <= window:
            outputs.append(attend(query_L, key_L, value_L, is_causal=True).transpose(1, 2))
        else:
            outputs += _windowed(attend, query_L, key_L, value_L, window)
    return torch.cat(outputs, 1)


def _windowed(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, window: int
) -> Iterator[Tensor]:
    """A document longer than the window, block by block: a token sees itself and the `window - 1` tokens before it,
    so memory grows with L * window, not with L * L."""
    length, block = query.shape[2], max(window, 256)
    for start in range(0, length, block):
        stop, first = min(start + block, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        seen = (distance >= 0) & (distance < window)
        rows = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop])
        yield attend(*rows, attn_mask=seen).transpose(1, 2)


@functools.cache
def _varlen() -> tuple[str, Varlen] | None:
    """The variable-length kernel of this machine and its name: flash-attn's if installed, else torch's, else None."""
    if find_spec("flash_attn") is not None:
        if find_spec("flash_attn.flash_attn_interface") is not None:
            from flash_attn import flash_attn_varlen_func  # pyrefly: ignore[missing-import]

            return "flash-attn", functools.partial(_flash_attn, flash_attn_varlen_func)
        if find_spec("flash_attn.cute") is not None:
            from flash_attn.cute import flash_attn_varlen_func  # pyrefly: ignore[missing-import]

            return "flash-attn 4", functools.partial(_flash_attn_cute, flash_attn_varlen_func)
    from torch.nn.attention.varlen import varlen_attn

    known = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    return ("torch's varlen_attn", functools.partial(_torch_varlen, varlen_attn)) if known else None


# All three count a window as the tokens before the current one, transformers counts the current one too.


def _flash_attn(
    call: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    reach = (window - 1, 0) if window else (-1, -1)
    return call(q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True, window_size=reach)


def _flash_attn_cute(
    call: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    reach = (window - 1, 0) if window else (None, None)
    found = call(q, k, v, **bounds, softmax_scale=scale, causal=True, window_size=reach)
    return found[0] if isinstance(found, tuple) else found


def _torch_varlen(
    call: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    reach, grouped = (window - 1 if window else -1, 0), q.shape[1] != k.shape[1]
    return call(q, k, v, starts, starts, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped)


def packed_mask(**arguments: Any) -> Tensor | None:
    """Mask function for `AttentionMaskInterface`: transformers' sdpa mask, but put off for packed rows.

    transformers says that it found several documents by forbidding the causal short cut. Then a stand-in of one
    element stretched to (1, 1, T, T) is returned that knows how to build the real mask, should the attention function
    be called without document bounds.
    """
    packed = (
        arguments["batch_size"] == 1
        and arguments["q_length"] == arguments["kv_length"] > 1
        and arguments.get("attention_mask") is None
        and not arguments.get("allow_is_causal_skip", True)
        and not arguments.get("use_vmap", False)
    )
    if not packed:
        return sdpa_mask(**arguments)
    length = arguments["q_length"]
    mask = torch.ones((), dtype=torch.bool, device=arguments.get("device", "cpu")).expand(1, 1, length, length)
    mask.llmtune_window = arguments.get("local_size")  # type: ignore[attr-defined]
    mask.llmtune_build = functools.cache(functools.partial(sdpa_mask, **arguments))  # type: ignore[attr-defined]
    return mask


def _is_stand_in(mask: Tensor) -> bool:
    return mask.ndim == 4 and mask.numel() > 1 and not any(mask.stride())


def _real_mask(mask: Tensor | None) -> Tensor | None:
    if mask is None or not _is_stand_in(mask):
        return mask
    if not hasattr(mask, "llmtune_build"):
        raise RuntimeError(
            "the attention mask of a packed batch was copied on its way and the document bounds are missing; "
            "leave packed_attention out of kernel_config.include_kernels for this model"
        )
    return mask.llmtune_build()


def _suits(model: Any, context: RunContext) -> str | None:
    config, language = model.config, language_model(model)
    text, taken = config.get_text_config(), inspect.signature(model.base_model.forward).parameters
    chosen = getattr(config, "_attn_implementation", None)
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reasons = {
        "its attention does not go through transformers' AttentionInterface":
            not getattr(model, "_supports_attention_backend", False),
        "it is an encoder-decoder": config.is_encoder_decoder,
        "its pictures see themselves in both directions": text is not config and "token_type_ids" in taken,
        "it looks at pictures by cross attention": "cross_attention_mask" in taken,
        "it soft-caps attention scores": getattr(text, "attn_logit_softcapping", None) is not None,
        "it has attention sinks":
            any(name.rpartition(".")[2] in ("sinks", "sink") for name, _ in language.named_parameters()),
        "it biases attention by distance": bool(getattr(text, "alibi", False)),
        "its attention is not causal":
            bool(getattr(text, "use_bidirectional_attention", False))
            or any(getattr(part, "is_causal", True) is False for part in language.modules()),
        f"it has layers of the type {', '.join(sorted(layers))}": bool(layers),
        f"its attention is set to {chosen}, by its authors or by the recipe's flash_attn":
            chosen not in (None, "sdpa", NAME),
        "its convolutions reach across document bounds":
            any(isinstance(part, nn.Conv1d) for part in language.modules()),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def _apply(model: Any, context: RunContext) -> ModelEdit:
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    varlen = _varlen() if context.device == "cuda" else None
    how = f"{varlen[0]} for 16-bit types" if varlen else "each document by itself"
    return ModelEdit(
        attention=NAME,
        report=[f"packed_attention: used in {model.config.get_text_config().num_hidden_layers} layers, {how}"],
    )


SPEC = KernelSpec(
    id="packed_attention",
    op="attention",
    summary="Documents of a flat batch attend to themselves without a mask over the batch",
    models="causal decoders on transformers' AttentionInterface, without soft-capped scores, sinks or convolutions",
    devices=frozenset({"cpu", "cuda"}),
    suits=_suits,
    apply=_apply,
    train_only=True,
)
