"""What generates answers: `engine_config: transformers`, on the model as it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """How the engine answers; how an answer is drawn is said with the command."""

    max_cache_tokens: Annotated[int, Ge(1)] | None = None
    """While serving, most tokens of prompts and answers together that a model's cache may come to hold, with padding;
    further requests wait. One request alone is always answered. null is no limit."""


def build(config: TransformersConfig) -> Any:
    """The engine."""
    from .transformers_engine import TransformersEngine

    return TransformersEngine(config.max_cache_tokens)


@hookimpl
def engine_config() -> list[Plugin]:
    """`transformers`."""
    return [
        Plugin(
            name="transformers", config=TransformersConfig, build=build,
            summary="transformers' generate on the loaded model, sharded and quantised ones included",
        )
    ]  # fmt: skip
