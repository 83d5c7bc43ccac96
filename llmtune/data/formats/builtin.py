"""The formats that ship with llmtune, as the plugins that the core offers under `data_config`."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.contract.errors import DataError, did_you_mean, listed
from llmtune.contract.records import Plugin
from llmtune.data.formats.chats import Alpaca, AlpacaConfig, OpenAi, PromptCompletion, ShareGpt
from llmtune.data.formats.choose import Auto, Formats, detectable
from llmtune.data.formats.messages_in import TagsConfig
from llmtune.data.formats.pairs import KtoRows, PreferencePairs
from llmtune.data.formats.plain import PlainConfig, PlainText, PromptOnly, TokenRows


@dataclass(frozen=True, kw_only=True)
class DetectedConfig:
    """Each data set's format is found by looking at its first rows."""


FORMATS = (
    Plugin(name="auto", config=DetectedConfig, build=lambda config: Auto(), summary="Recognise each data set's format"),
    Plugin(name="alpaca", config=AlpacaConfig, build=Alpaca, summary="instruction, input, output; history"),
    Plugin(name="sharegpt", config=TagsConfig, build=ShareGpt, summary="conversations of from and value"),
    Plugin(name="openai", config=TagsConfig, build=OpenAi, summary="messages of role and content, tool calls"),
    Plugin(name="completion", config=TagsConfig, build=PromptCompletion, summary="prompt and completion"),
    Plugin(name="preference", config=TagsConfig, build=PreferencePairs, summary="chosen and rejected answers"),
    Plugin(name="kto", config=TagsConfig, build=KtoRows, summary="answers with a label, true or false"),
    Plugin(name="prompt", config=TagsConfig, build=PromptOnly, summary="questions without answers"),
    Plugin(name="text", config=PlainConfig, build=PlainText, summary="plain text"),
    Plugin(name="tokens", config=PlainConfig, build=TokenRows, summary="rows that are tokenised already"),
)


def builtin_formats() -> Formats:
    """The formats that ship with llmtune and no others, for data that no recipe describes."""
    plugins = {plugin.name: plugin for plugin in FORMATS}

    def find(name: str) -> tuple[Plugin, str]:
        if name not in plugins:
            raise DataError(f'no format "{name}".{did_you_mean(name, plugins)} Known: {listed(plugins, 12)}')
        return plugins[name], "llmtune"

    return Formats(known=detectable(FORMATS), find=find)
