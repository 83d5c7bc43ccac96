"""Tiny models, those of `llmtune.testing` among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtune.testing.tiny import CHATML, CHATML_MARKED, tiny_config, tiny_model, tiny_model_folder, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CHATML", "CHATML_MARKED", "always", "tiny_config", "tiny_model", "tiny_model_folder", "tiny_tokenizer"]


def always(model: PreTrainedModel, token: int) -> Any:
    """Make the model say `token` for ever: the head looks at a direction that a constant embedding fills."""
    import torch

    parts: Any = model
    with torch.no_grad():
        parts.model.embed_tokens.weight.fill_(1.0)
        parts.lm_head.weight.zero_()
        parts.lm_head.weight[token] = parts.model.norm(torch.ones(1, model.config.hidden_size)).sign()
        for layer in parts.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
