"""Tiny random models of each family, built from their configs, and what is peculiar about each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.matrix.axes import Combo
from tests.tiny import tiny_config, tiny_tokenizer

WAYS: dict[str, tuple[str, str]] = {
    "full": ("full precision", "full"),
    "LoRA": ("full precision", "lora"),
    "QLoRA": ("nf4 double", "lora"),
    "DoRA": ("full precision", "dora"),
    "freeze": ("full precision", "freeze"),
    "LoRA on experts": ("full precision", "experts"),
    "QLoRA, experts too": ("nf4 double", "experts"),
}
"""How each family is trained: column of the table to (base, method)."""

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    type: str
    """transformers' `model_type`."""
    has: str
    """What it has that others have not, in the table's words."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config besides the usual tiny sizes."""
    layers: str = "model.layers"
    """Where its repeated blocks are."""
    plain: bool = False
    """Whether the config takes none of the usual names of sizes, so that `changes` is all of it."""
    targets: str = "all-linear"
    """What `target_modules: all` means in it, for PEFT."""
    auto: str = "AutoModelForCausalLM"
    """transformers' class that opens it."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys it needs."""
    experts: bool = False
    """Whether it has stacks of experts, `experts.gate_up_proj` and `experts.down_proj`."""
    refused: str = ""
    """A part of the sentence with which a plan refuses to train it."""
    unpackable: str = ""
    """A part of the sentence with which a plan refuses `packing: true`."""


ATTENTION = "q_proj,k_proj,v_proj,o_proj"
_TEXT = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
_BOTH_LAYERS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    "llama": Family(type="llama", has="untied head"),
    "qwen2": Family(
        type="qwen2", has="biases of queries, keys and values; tied head", changes={"tie_word_embeddings": True}
    ),
    "qwen3": Family(type="qwen3", has="norms of queries and keys"),
    "gemma2": Family(
        type="gemma2",
        has="soft-capped logits and attention, a sliding window in every other layer, tied head",
        changes={**_GEMMA, "final_logit_softcapping": 2.0, "layer_types": _BOTH_LAYERS},
    ),
    "gemma3": Family(
        type="gemma3_text",
        has="sliding layers with rotary buffers of their own, tied head",
        changes={**_GEMMA, "layer_types": _BOTH_LAYERS},
    ),
    "gemma4": Family(
        type="gemma4_text",
        has="layers of two widths of heads, embeddings and a scale in each layer, tied head",
        changes={
            **_GEMMA, "layer_types": _BOTH_LAYERS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384,
            "global_head_dim": 16, "num_kv_shared_layers": 0,
        },
    ),
    "mistral": Family(type="mistral", has="a sliding window in every layer", changes={"sliding_window": 16}),
    "phi": Family(
        type="phi",
        has="biases everywhere, in the head too; rotary positions on part of each head; parallel blocks",
        changes={"num_key_value_heads": 4},
    ),
    "phi3": Family(
        type="phi3",
        has="one matrix for queries, keys and values, one for gate and up",
        changes={"num_key_value_heads": 4},
    ),
    "gpt2": Family(
        type="gpt2",
        has="Conv1D layers, learned positions, tied head",
        changes={
            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 384, "bos_token_id": 1,
            "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        layers="transformer.h",
        plain=True,
    ),
    "gpt_neo": Family(
        type="gpt_neo",
        has="local layers, mask buffers, attention without a scale",
        changes={
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": 16, "max_position_embeddings": 512, "vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2,
        },
        layers="transformer.h",
        plain=True,
        unpackable="has attention of its own",
    ),
    "qwen3_moe": Family(
        type="qwen3_moe",
        has="experts fused by transformers' conversion mapping",
        changes={**MOE, "num_experts": 4},
        targets=ATTENTION,
        experts=True,
    ),
    "mixtral": Family(
        type="mixtral",
        has="experts renamed and fused while loading",
        changes={**MOE, "num_local_experts": 4},
        targets=ATTENTION,
        experts=True,
    ),
    "recurrent_gemma": Family(
        type="recurrent_gemma",
        has="recurrent layers, soft-capped logits",
        changes={"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        unpackable="has recurrent layers",
    ),
    "gemma3_vision": Family(
        type="gemma3",
        has="a vision tower, untrained by text alone",
        changes={
            "text_config": {**_TEXT, **_GEMMA},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        targets=r".*language_model.*_proj",
        layers="model.language_model.layers",
        plain=True,
    ),
    "qwen2_vl": Family(
        type="qwen2_vl",
        has="a vision tower, positions in three dimensions",
        changes={
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        },
        targets=r".*language_model.*_proj",
        layers="model.language_model.layers",
        auto="AutoModelForImageTextToText",
        plain=True,
    ),
    "llama_classifier": Family(
        type="llama",
        has="a classification head",
        changes={"num_labels": 3},
        auto="AutoModelForSequenceClassification",
        keys={"model_class": "cls"},
        refused="sft predicts tokens",
    ),
}  # fmt: skip


def family_combos() -> list[Combo]:
    """Every way of training each family, on 1 and 2 ranks, packed or not, with and without kernels."""
    axes = {"ranks": (1, 2), "packing": (False, True), "kernels": ("none", "auto")}
    return [
        Combo(family=name, base=base, method=method, accumulation=2, **dict(zip(axes, values, strict=True)))
        for name, family in FAMILIES.items()
        for way, (base, method) in WAYS.items()
        if family.experts or method != "experts"
        for values in itertools.product(*axes.values())
    ]


def make_model_folder(folder: Path, family: Family) -> None:
    """Save a random model of `family` and the tiny tokenizer; the same values every time."""
    import torch
    import transformers

    tokenizer = tiny_tokenizer(vocab_size=384)
    if family.plain:
        config = transformers.AutoConfig.for_model(family.type, **family.changes)
    else:
        config = tiny_config(family.type, **{"vocab_size": len(tokenizer), **family.changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, family.auto).from_config(config, dtype=torch.float32)
        with (
            torch.no_grad()
        ):  # as initialised, biases are all zero and norms all one: nothing would tell if they were lost
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
