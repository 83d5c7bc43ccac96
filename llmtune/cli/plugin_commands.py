"""Commands of installed packages: an entry point in the group `llmtune.commands` names a dataclass, whose fields are
the command's keys. Packages are read by their metadata, and only where the core has no command of the word."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llmtune.cli.arguments import add_command, add_overrides
from llmtune.contract.errors import PluginError, RecipeError, blaming, raise_all

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from _typeshed import DataclassInstance

GROUP = "llmtune.commands"
"""Entry point group; an entry's name is the command's word."""
FIRST_PARTY = {"web": "llmtune-web"}
"""Commands that packages of llmtune's own repository offer, to be told from misspelt words."""


class PluginCommand(Protocol):
    """What the dataclass of a command has besides its keys."""

    def run(self) -> int | None:
        """Do it; the exit code. Errors of llmtune are shown as a sentence."""


def add_plugin_commands(commands: Any, words: Sequence[str]) -> None:
    """Add the command that `words` begin with, if packages offer it, or all of them where help is asked for.

    Raises PluginError where it cannot be imported, two packages offer it, or the one that would is not installed.
    """
    word = words[0] if words else "--help"
    if word in ("-h", "--help"):
        from llmtune.recipe.remembered import remembered

        for name, summary in json.loads(remembered("commands", _offers)):
            if name not in commands.choices:
                add_command(commands, name, None, summary)
    elif not word.startswith("-") and word not in commands.choices:
        offers = [entry for entry in _installed() if entry.name == word]
        if len(offers) > 1:
            names = " and ".join(_package(entry) for entry in offers)
            raise PluginError(f"{word}: is a command of {names}; uninstall one of the two, or block it with {_block()}")
        if offers:
            _add(commands, offers[0])
        elif package := FIRST_PARTY.get(word):
            raise PluginError(f"{word}: is a command of {package}, not installed: pip install ./plugins/{word}")


def _offers() -> tuple[str, bool]:
    return json.dumps(sorted((entry.name, _summary(entry)) for entry in _installed())), True


def _installed() -> list[EntryPoint]:
    """What packages' metadata name, less what the environment blocks."""
    from importlib.metadata import entry_points

    from llmtune.contract.schema import split_names

    blocked = split_names(os.environ.get(_block()))
    return [entry for entry in entry_points(group=GROUP) if not {entry.name, _package(entry)} & {*blocked}]


def _block() -> str:
    from llmtune.recipe.packages import BLOCK

    return BLOCK


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


def _summary(entry: EntryPoint) -> str:
    told = entry.dist.metadata["Summary"] if entry.dist else None
    return f"{told or 'A command'} ({_package(entry)})"


def _add(commands: Any, entry: EntryPoint) -> None:
    import dataclasses

    from llmtune.contract.schema import defaults, describe, document, field_types

    with blaming(f"the command {entry.name} of {_package(entry)}", "import", but=PluginError):
        config = entry.load()
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise PluginError(f"{entry.name}: {entry.value} of {_package(entry)} is no dataclass with the command's keys")
    keys, known = document(config), defaults(config)
    lines = [
        f"  {key}{f'={known[key]}' if key in known else ''}: {keys.get(key, '')} It is {describe(kind)}."
        for key, kind in field_types(config).items()
    ]
    made = add_command(commands, entry.name, partial(_run, config), _summary(entry))
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.description, made.epilog = (config.__doc__ or "").strip(), "\n".join(["keys:", *lines])
    add_overrides(made, "the keys below")


def _run(config: type[DataclassInstance], options: Any) -> int | None:
    from llmtune.contract.schema import decode
    from llmtune.recipe.recipe import parse_overrides

    made, problems = decode(config, parse_overrides(options.overrides))
    raise_all([RecipeError(f"command line {problem.key}: {problem.message}") for problem in problems])
    return made.run()
