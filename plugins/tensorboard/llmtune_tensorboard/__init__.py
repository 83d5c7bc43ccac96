"""TensorBoard: `logger_config: tensorboard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """Where TensorBoard's event files go."""

    log_dir: str | None = None
    """Folder of the event files; null means `loggers/tensorboard` in the run's folder. `~` is your home."""


def build(config: TensorBoardConfig) -> Any:
    """A `Logger`; imports torch and tensorboard."""
    from .writer import TensorBoard

    return TensorBoard(config)


@hookimpl
def logger_config() -> list[Plugin]:
    """`tensorboard`."""
    return [
        Plugin(
            name="tensorboard",
            config=TensorBoardConfig,
            build=build,
            summary="Metrics as TensorBoard event files",
            requires=("tensorboard>=2.16",),
        )
    ]
