"""What generates answers: `engine_config: transformers`, on the model as it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """The engine has no keys: how an answer is drawn is said with the command."""


def build(config: TransformersConfig) -> Any:
    """The engine."""
    from .transformers_engine import TransformersEngine

    return TransformersEngine()


@hookimpl
def engine_config() -> list[Plugin]:
    """`transformers`."""
    return [
        Plugin(
            name="transformers", config=TransformersConfig, build=build,
            summary="transformers' generate on the loaded model, sharded and quantised ones included",
        )
    ]  # fmt: skip
