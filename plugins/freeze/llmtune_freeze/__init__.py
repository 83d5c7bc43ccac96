"""Train some layers, freeze the rest: `peft_config: freeze`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Keys of `peft_config: {name: freeze}`."""

    freeze_trainable_layers: int = 2
    """How many layers train: n > 0 the last n, n < 0 the first n."""
    freeze_trainable_modules: str | tuple[str, ...] = ("all",)
    """Which parts of those layers train, such as `mlp` or `self_attn.q_proj`; `all` for everything in them. A list or
    a comma string."""
    freeze_extra_modules: str | tuple[str, ...] | None = None
    """What trains outside the layers, such as `embed_tokens`, `norm`, `lm_head`. A list or a comma string."""
    cast_trainable_params_to_fp32: bool = True
    """Store and update trained weights in float32; false stores them in the run's compute type."""

    def __post_init__(self) -> None:
        if self.freeze_trainable_layers == 0:
            raise ValueError(
                "freeze_trainable_layers: found 0, allowed is n > 0 (the last n layers train) or n < 0 (the first n)"
            )


def build(config: FreezeConfig) -> Any:
    """The edit that `config` describes."""
    from .edit import Freeze

    return Freeze(config)


@hookimpl
def peft_config() -> list[Plugin]:
    """`freeze`."""
    return [
        Plugin(
            name="freeze",
            config=FreezeConfig,
            build=build,
            summary="Train the last or first layers, freeze the rest",
            refuses=frozenset({"quantized_base"}),
        )
    ]
