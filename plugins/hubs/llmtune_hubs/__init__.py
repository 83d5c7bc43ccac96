"""Hubs: `hub_config: modelscope` and `hub_config: modelers`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class ModelScopeConfig:
    """Keys of `hub_config: {name: modelscope}`."""

    token: str | None = field(default=None, repr=False)
    """Access token of ModelScope for private files; null takes the recipe's `token`, else the hub's own login."""
    endpoint: str | None = None
    """Address of the server; null is MODELSCOPE_ENDPOINT, else https://modelscope.cn."""


@dataclass(frozen=True, kw_only=True)
class ModelersConfig:
    """Keys of `hub_config: {name: modelers}`."""

    token: str | None = field(default=None, repr=False)
    """Access token of Modelers for private files; null takes the recipe's `token`."""
    endpoint: str | None = None
    """Address of the server; null is OPENMIND_HUB_ENDPOINT, else https://modelers.cn."""


def _modelscope(config: ModelScopeConfig) -> Any:
    from .modelscope import ModelScope

    return ModelScope(config.token, config.endpoint)


def _modelers(config: ModelersConfig) -> Any:
    from .modelers import Modelers

    return Modelers(config.token, config.endpoint)


@hookimpl
def hub_config() -> list[Plugin]:
    """`modelscope` and `modelers`."""
    return [
        Plugin(
            name="modelscope", config=ModelScopeConfig, build=_modelscope, requires=("modelscope-hub>=0.5",),
            summary="ModelScope, through modelscope-hub",
        ),
        Plugin(
            name="modelers", config=ModelersConfig, build=_modelers, requires=("openmind-hub>=1.2",),
            summary="Modelers, through openmind-hub",
        ),
    ]  # fmt: skip
