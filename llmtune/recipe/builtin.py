"""What ships with the core, offered through the same hooks as anyone's plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune.contract.hookspecs import hookimpl
from llmtune.contract.records import Plugin
from llmtune.data.formats.chats import Alpaca, AlpacaConfig, Completion, OpenAi, ShareGpt
from llmtune.data.formats.choose import Auto
from llmtune.data.formats.messages_in import TagsConfig
from llmtune.data.formats.pairs import KtoRows, PreferencePairs
from llmtune.data.formats.plain import PlainConfig, PlainText, PromptOnly, TokenRows
from llmtune.distributed.config import Fsdp2Config


def _fsdp2(config: Any) -> Any:
    from llmtune.distributed.fsdp2 import Fsdp2

    return Fsdp2(config)


@hookimpl
def dist_config() -> list[Plugin]:
    """The one way of spreading a model that needs nothing but torch."""
    return [
        Plugin(
            name="fsdp2",
            config=Fsdp2Config,
            build=_fsdp2,
            summary="PyTorch FSDP2: parameters, gradients and optimiser state sharded by layer",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Each data set's format is found by looking at its first rows."""


@hookimpl
def data_config() -> list[Plugin]:
    """The shapes of rows that most data sets have."""
    return [
        Plugin(name="auto", config=AutoConfig, build=lambda config: Auto(), summary="Recognise each data set's format"),
        Plugin(name="alpaca", config=AlpacaConfig, build=Alpaca, summary="instruction, input, output; history"),
        Plugin(name="sharegpt", config=TagsConfig, build=ShareGpt, summary="conversations of from and value"),
        Plugin(name="openai", config=TagsConfig, build=OpenAi, summary="messages of role and content, tool calls"),
        Plugin(name="completion", config=TagsConfig, build=Completion, summary="prompt and completion"),
        Plugin(name="preference", config=TagsConfig, build=PreferencePairs, summary="chosen and rejected answers"),
        Plugin(name="kto", config=TagsConfig, build=KtoRows, summary="answers with a label, true or false"),
        Plugin(name="prompt", config=TagsConfig, build=PromptOnly, summary="questions without answers"),
        Plugin(name="text", config=PlainConfig, build=PlainText, summary="plain text"),
        Plugin(name="tokens", config=PlainConfig, build=TokenRows, summary="rows that are tokenised already"),
    ]
