"""What answers are worth (`reward_config`): a Python function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune import Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """Keys of `reward_config: {name: function}`."""

    function: str
    """`module:function` of a package that is installed."""


def build_function(config: FunctionConfig) -> Any:
    """The reward that a Python function gives."""
    from .function import FunctionReward

    return FunctionReward(config)


@hookimpl
def reward_config() -> list[Plugin]:
    """`function`."""
    return [Plugin(name="function", config=FunctionConfig, build=build_function, summary="A Python function")]
