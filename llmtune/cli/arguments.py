"""What commands have in common: how they are declared, and the arguments that several take."""

from __future__ import annotations

import argparse
from typing import Any

KEYS = "learning_rate=1e-4 peft_config.r=32"
"""Keys of a recipe, as they are written on the command line."""


def add_command(commands: Any, name: str, run: Any, text: str, more: str = "") -> argparse.ArgumentParser:
    """The parser of a new command, which calls `run` with its options. `text` is its line in the list of commands."""
    made = commands.add_parser(name, help=text, description=f"{text}. {more}".strip())
    made.set_defaults(command=run)
    return made


def add_recipe(parser: argparse.ArgumentParser, example: str = "cutoff_len=4096") -> None:
    """Let a command take a recipe, and keys that go before it."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML or JSON file")
    add_overrides(parser, f"override keys: {example}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Let a command take what is used: a run, a model, or what stands for one."""
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run's or a model's folder, a checkpoint, an adapter of PEFT, a hub id, or a recipe",
    )


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """Let a command take any number of `key=value`."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def count(text: str) -> int:
    """A number of things from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, allowed is a whole number >= 1")
    return int(text)
