"""What ships with the core, offered through the same hooks as anyone's plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtune.contract.hookspecs import hookimpl
from llmtune.contract.records import Plugin
from llmtune.data.formats.builtin import FORMATS
from llmtune.distributed.config import Fsdp2Config
from llmtune.distributed.launch import Torchrun
from llmtune.model.huggingface import HuggingFace


@dataclass(frozen=True, kw_only=True)
class TorchrunConfig:
    """The launcher has no keys: how many ranks and machines there are is said with the command."""


def _torchrun(config: TorchrunConfig) -> Torchrun:
    return Torchrun()


def _fsdp2(config: Any) -> Any:
    from llmtune.distributed.fsdp2 import Fsdp2

    return Fsdp2(config)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """The hub has no keys: `token` and `cache_dir` are the recipe's own."""


def _huggingface(config: HuggingFaceConfig) -> HuggingFace:
    return HuggingFace()


@hookimpl
def hub_config() -> list[Plugin]:
    """The hub whose library is always there."""
    return [
        Plugin(
            name="huggingface",
            config=HuggingFaceConfig,
            build=_huggingface,
            summary="The Hugging Face hub, or what HF_ENDPOINT names in its place",
        )
    ]


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


@hookimpl
def launch_config() -> list[Plugin]:
    """The launcher that torch brings along."""
    return [
        Plugin(
            name="torchrun",
            config=TorchrunConfig,
            build=_torchrun,
            summary="torch's elastic launcher, on this machine and wherever the same command is run",
        )
    ]


@hookimpl
def data_config() -> list[Plugin]:
    """The shapes of rows that most data sets have."""
    return list(FORMATS)
