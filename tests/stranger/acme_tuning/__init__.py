"""What a recipe can name: `peft_config: ia3`, `quant_config: int8_rows`, `stage_config: smoothed` and `best_of`,
`data_config: forum`, `reward_config: small`, `engine_config: parrot`,
`launch_config: posse`, `hub_config: shelf`, `optim_config: polyak`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

from llmtune import Event, Ge, Lt, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """Keys of `peft_config: {name: ia3}`. After (IA)^3: https://arxiv.org/abs/2205.05638."""

    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Linear layers whose outputs are rescaled: last parts of their names, as a list or comma string."""
    start: float = 1.0
    """Value of all gains before training; 1 leaves the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Int8RowsConfig:
    """Keys of `quant_config: {name: int8_rows}`."""

    skip_modules: str | tuple[str, ...] = ()
    """Linear layers that stay as they are, besides output heads: last parts of their names."""


@dataclass(frozen=True, kw_only=True)
class SmoothedConfig:
    """Keys of `stage_config: {name: smoothed}`."""

    beta: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the target that is spread evenly over the vocabulary; 0 is plain supervised fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class BestOfConfig:
    """Keys of `stage_config: {name: best_of}`."""

    elder: str
    """Folder of the model that says how much a token counts."""
    of: Annotated[int, Ge(1)] = 3
    """Answers to each prompt, the best of which is learnt."""
    answer_tokens: Annotated[int, Ge(1)] = 6
    """Most tokens of an answer."""


@dataclass(frozen=True, kw_only=True)
class PolyakConfig:
    """Keys of `optim_config: {name: polyak}`."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the velocity that is left after a step."""


@dataclass(frozen=True, kw_only=True)
class NoKeys:
    """Parts without keys."""


@dataclass(frozen=True, kw_only=True)
class ForumConfig:
    """Keys of `data_config: {name: forum}`."""

    least_votes: Annotated[int, Ge(0)] = 1
    """Votes that a reply needs to be learnt."""


def _forum(config: ForumConfig) -> Any:
    from acme_tuning.forum import Forum

    return Forum(config)


def _ia3(config: Ia3Config) -> Any:
    from acme_tuning.ia3 import Ia3

    return Ia3(config)


def _int8_rows(config: Int8RowsConfig) -> Any:
    from acme_tuning.int8_rows import Int8Rows

    return Int8Rows(config)


def _smoothed(config: SmoothedConfig) -> Any:
    from acme_tuning.smoothed import Smoothed

    return Smoothed(config)


def _best_of(config: BestOfConfig) -> Any:
    from acme_tuning.best_of import BestOf

    return BestOf(config)


def _parrot(config: NoKeys) -> Any:
    from acme_tuning.best_of import Parrot

    return Parrot()


@dataclass(frozen=True, kw_only=True)
class ShelfConfig:
    """Keys of `hub_config: {name: shelf}`."""

    root: str
    """Folder with a folder for each owner, which has one for each repository."""


def _shelf(config: ShelfConfig) -> Any:
    from acme_tuning.shelf import Shelf

    return Shelf(config.root)


def _posse(config: NoKeys) -> Any:
    from acme_tuning.posse import Posse

    return Posse()


def _polyak(config: PolyakConfig) -> Any:
    from acme_tuning.polyak import Polyak

    return Polyak(config)


def _small(config: NoKeys) -> Any:
    from acme_tuning.best_of import Small

    return Small()


@hookimpl
def peft_config() -> list[Plugin]:
    return [Plugin(name="ia3", config=Ia3Config, build=_ia3, summary="One trained gain for each output of a layer")]


@hookimpl
def quant_config() -> list[Plugin]:
    return [
        Plugin(
            name="int8_rows",
            config=Int8RowsConfig,
            build=_int8_rows,
            summary="Bytes with one float32 scale a row",
            gives=frozenset({"quantized_base"}),
        )
    ]


@hookimpl
def stage_config() -> list[Plugin]:
    return [
        Plugin(name="smoothed", config=SmoothedConfig, build=_smoothed, summary="Label-smoothed fine-tuning"),
        Plugin(name="best_of", config=BestOfConfig, build=_best_of, summary="The best of several answers"),
    ]


@hookimpl
def engine_config() -> list[Plugin]:
    return [Plugin(name="parrot", config=NoKeys, build=_parrot, summary="Answers that follow from the prompt")]


@hookimpl
def hub_config() -> list[Plugin]:
    return [Plugin(name="shelf", config=ShelfConfig, build=_shelf, summary="Repositories that are folders")]


@hookimpl
def launch_config() -> list[Plugin]:
    return [Plugin(name="posse", config=NoKeys, build=_posse, summary="Plain processes of this machine")]


@hookimpl
def optim_config() -> list[Plugin]:
    return [Plugin(name="polyak", config=PolyakConfig, build=_polyak, summary="Gradient descent with a heavy ball")]


@hookimpl
def reward_config() -> list[Plugin]:
    return [Plugin(name="small", config=NoKeys, build=_small, summary="Tokens of small numbers")]


@hookimpl
def data_config() -> list[Plugin]:
    return [Plugin(name="forum", config=ForumConfig, build=_forum, summary="Posts with their best reply")]


@hookimpl
def observe(event: Event) -> None:
    """Append the event's kind to the file that ACME_EVENTS names."""
    if path := os.environ.get("ACME_EVENTS"):
        with open(path, "a", encoding="utf-8") as file:
            print(event.kind, event.step, file=file)
