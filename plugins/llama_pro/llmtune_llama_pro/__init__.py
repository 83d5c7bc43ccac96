"""Block expansion: `peft_config: llama_pro` puts new layers into a frozen model, and only they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class LlamaProConfig:
    """Keys of `peft_config: {name: llama_pro}`. LLaMA Pro: https://arxiv.org/abs/2401.02415."""

    num_expanded_layers: Annotated[int, Ge(1)] = 2
    """How many layers are added, spread evenly: at most as many as the model has. Each starts as a copy of the layer
    before it that adds nothing yet, so that the model begins with the answers of its base."""
    cast_trainable_params_to_fp32: bool = True
    """Store and update trained weights in float32; false stores them in the run's compute type."""


def build(config: LlamaProConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import LlamaPro

    return LlamaPro(config)


@hookimpl
def peft_config() -> list[Plugin]:
    """`llama_pro`."""
    return [
        Plugin(
            name="llama_pro",
            config=LlamaProConfig,
            build=build,
            summary="Add layers that start as the identity and train, freeze the rest (LLaMA Pro)",
            # The result is a whole model, whose frozen layers would be written as the quantised ones say.
            refuses=frozenset({"quantized_base"}),
        )
    ]
