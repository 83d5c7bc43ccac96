"""How weights arrive on the ranks: `init_on_meta`, `init_on_rank0`, `init_on_default`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """These plugins have no keys."""


def _build(name: str) -> Any:
    def build(config: InitConfig) -> Any:
        from llmtune_init import ways

        return getattr(ways, name)()

    return build


@hookimpl
def init_config() -> list[Plugin]:
    """The three ways."""
    return [
        Plugin(
            name="init_on_meta",
            config=InitConfig,
            build=_build("OnMeta"),
            summary="Each rank reads only the rows it keeps",
        ),
        Plugin(
            name="init_on_rank0",
            config=InitConfig,
            build=_build("OnRank0"),
            summary="Rank 0 reads and sends to the others",
        ),
        Plugin(
            name="init_on_default",
            config=InitConfig,
            build=_build("OnDefault"),
            summary="Each rank reads whole tensors onto its device",
        ),
    ]
