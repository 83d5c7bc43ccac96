"""`llmtune runs list`, `show`, `compare` and `plot`. None of them loads torch; only `plot` loads matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.cli.arguments import add_command
from llmtune.contract.errors import CheckpointError, PlanError
from llmtune.terminal import columns, say

if TYPE_CHECKING:
    from llmtune.history.listing import RunList

RUNS = "runs"
"""Where recipes keep their runs by default."""


def add_commands(commands: Any) -> None:
    """Add `runs` and its commands to the parser of `llmtune`."""
    text = "Look at runs: what they were, how they differ, their curves"
    runs = commands.add_parser("runs", help=text, description=f"{text}. Only their folders are read.")
    inner = runs.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listed = add_command(inner, "list", _list, "List the runs below folders, those written to last at the end")
    listed.add_argument("folders", nargs="*", default=[RUNS], metavar="FOLDER", help=f"(default: {RUNS})")

    show = add_command(inner, "show", _show, "Show what a run was and has come to")
    show.add_argument("run", metavar="RUN", help=f"a run's folder, or its name in {RUNS}")

    compare = add_command(inner, "compare", _compare, "Show the settings in which runs differ, and their results")
    plot = add_command(inner, "plot", _plot, "Draw the curves of runs into one picture")
    for command in (compare, plot):
        command.add_argument(
            "runs", nargs="+", metavar="RUN", help=f"runs' folders, their names in {RUNS}, or folders of runs"
        )
    plot.add_argument("-o", "--output", default="runs.png", metavar="FILE", help="png, svg or pdf (default: runs.png)")
    plot.add_argument("--metrics", default="loss", metavar="loss,lr,...", help="a panel for each (default: loss)")
    plot.add_argument("--smooth", type=float, default=0.0, metavar="W", help="0 <= W < 1, as TensorBoard (default: 0)")
    plot.add_argument("--across", default="step", metavar="WHAT", help="step, epoch or tokens (default: step)")
    for command in (listed, show, compare, plot):
        command.add_argument("--json", action="store_true", help="for machines")


def _list(options: Any) -> None:
    found = _found(options.folders)
    if options.json:
        _print(found.as_dicts())
    elif not len(found):
        say(f"No runs of llmtune below {', '.join(options.folders)}.")
    else:
        print(found)
        for run in found:
            for problem in run.problems:
                say(f"llmtune: {problem}", sys.stderr)


def _show(options: Any) -> None:
    from llmtune.history.summary import RunSummary

    run = RunSummary.of(_place(options.run))
    _print(run.as_dict()) if options.json else say(str(run))


def _compare(options: Any) -> None:
    found = _several(options.runs).compare()
    _print(found.as_dict()) if options.json else print(found)


def _plot(options: Any) -> None:
    from llmtune.data.plot import plotting_problem

    if problem := plotting_problem():
        raise PlanError(f"plot: {problem}")
    found, names = _several(options.runs), [name for name in options.metrics.split(",") if name]
    found.plot(options.output, names, options.smooth, options.across)
    if options.json:
        _print({"file": options.output, "runs": [str(run.folder) for run in found], "metrics": names})
    else:
        say(f"Wrote {options.output}")


def _several(words: list[str]) -> RunList:
    """The runs of a command line in its order. Raises CheckpointError for a word that leads to none."""
    from llmtune.history.listing import RunList

    parts = [_found([_place(word)]) for word in words]
    for word, part in zip(words, parts, strict=True):
        if not len(part):
            raise CheckpointError(
                f"{word}: neither it nor a folder below it holds a run of llmtune; see `llmtune runs list`"
            )
    unique = {run.folder.resolve(): run for part in parts for run in part}
    return RunList(list(unique.values()), columns(sys.stdout) or 160)


def _found(places: list[Any]) -> RunList:
    from llmtune.history.listing import RunList

    for place in places:
        if not Path(place).is_dir() and str(place) != RUNS:
            raise CheckpointError(f"{place}: is no folder; name one that runs were written to")
    return RunList.below(*places, width=columns(sys.stdout) or 160)


def _place(word: str) -> Path:
    """The folder of a run that is named by its path, or by its name in the folder of runs."""
    path, named = Path(word), Path(RUNS) / word
    return named if not path.exists() and named.exists() else path


def _print(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, default=str))
