"""The command line: its commands stand in the modules beside this one. Only this one decides exit codes; torch loads
inside commands."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from llmtune import __version__
from llmtune.cli import convert, data, doctor, extend, runs, serve, train, use
from llmtune.cli.plugin_commands import add_plugin_commands
from llmtune.contract.errors import LlmtuneError, keywords_from
from llmtune.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # Libraries make a million objects that stay. Looking for garbage among all of them took a tenth of every start;
    # what is young is looked through as often as ever.
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    try:
        options = _options(sys.argv[1:] if arguments is None else arguments)
        with keywords_from("command line"):
            return options.command(options) or 0
    except LlmtuneError as error:
        _record_for_launcher(error)
        _say(error)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader (`| head`) has gone; nothing more can be said to it.
            sys.stderr.close()
            return 0
        _record_for_launcher(error)
        say(f"llmtune: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        from llmtune.distributed.stopping import EXIT_INTERRUPTED, Stopped, end_children

        end_children()
        if isinstance(error, Stopped):
            _once(f"llmtune: {error}")
            return EXIT_INTERRUPTED
        _once("llmtune: interrupted")
        return 130


def _options(words: Sequence[str]) -> argparse.Namespace:
    top = parser(words)
    # argparse alone would refuse key=value words that follow an option.
    options, rest = top.parse_known_args(words)
    if strange := [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]:
        top.error(f"unrecognized arguments: {' '.join(strange)}{_without_dashes(strange[0])}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _without_dashes(word: str) -> str:
    """A word on keys of a recipe that are written like options, as other trainers take them."""
    from llmtune.recipe.keys import top_level_keys

    key, _, value = word.removeprefix("--").partition("=")
    key = key.replace("-", "_")
    known = key.partition(".")[0] in top_level_keys()
    return f"; keys of a recipe have no dashes: write {key}={value or '...'}" if known else ""


def _say(error: LlmtuneError) -> None:
    """The sentence, once on each machine if all ranks stop for it."""
    if not error.everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"llmtune: {error.where}{error}", sys.stderr)
    if error.everywhere:
        from llmtune.distributed.ranks import leave

        leave()


def _once(line: str) -> None:
    """A line on standard error, by one rank of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _record_for_launcher(error: BaseException) -> None:
    """Leave the error where torch's elastic launcher looks for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """All commands and their options; of those that packages offer, the one that `words` begin with, or all where they
    ask for help."""
    top = argparse.ArgumentParser(prog="llmtune", description="Fine-tune language models from a short recipe.")
    top.add_argument("--version", action="version", version=f"llmtune {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (train, convert, use, serve, data, runs, extend, doctor):
        group.add_commands(commands)
    add_plugin_commands(commands, words)
    return top
