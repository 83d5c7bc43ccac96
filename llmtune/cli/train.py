"""`llmtune train` and `plan`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from llmtune.cli.arguments import KEYS, add_command, add_recipe, count
from llmtune.cli.convert import read_recipe
from llmtune.cli.libraries import load_libraries
from llmtune.contract.errors import LlmtuneError, PlanError, RecipeError
from llmtune.terminal import doing, say


def add_commands(commands: Any) -> None:
    """Add what runs a recipe, and what says beforehand how it would run."""
    train = add_command(
        commands,
        "train",
        _train,
        "Train as a recipe says",
        "An interrupted run continues when the same command is run again.",
    )
    add_recipe(train, KEYS)
    train.add_argument(
        "--fresh", action="store_true", help="start over, deleting the run in output_dir, finished or not"
    )
    train.add_argument("--nproc", type=count, metavar="N", help="ranks on this machine (default: one per GPU)")
    train.add_argument("--nnodes", metavar="N", help="machines of the run, or LEAST:MOST of them (default: 1)")
    train.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet; HOST is one of them")
    train.add_argument("--rdzv-id", metavar="NAME", help="tells runs apart that meet at the same HOST:PORT")
    train.add_argument(
        "--max-restarts", type=count, metavar="N", help="start failed ranks again, so often at most (default: 0)"
    )
    train.add_argument("--dry-run", action="store_true", help="print what the recipe's launcher would run, and end")
    plan = add_command(
        commands,
        "plan",
        _plan,
        "Show what a recipe would do and what it costs, without reading weights",
        "Finds every error that a run would hit later. That a run does not fit its device is said, with what would "
        "help, and is no error: the exit code is 0.",
    )
    add_recipe(plan, KEYS)
    plan.add_argument("--nproc", type=count, metavar="N", help="plan for this many ranks of this machine")
    plan.add_argument("--ranks", type=count, metavar="N", help="plan for this many ranks, on any machines")
    plan.add_argument("--device", metavar="NAME", help="of this kind: h100, a100, rtx4090, ... or a memory, 24GB")
    plan.add_argument("--json", action="store_true", help="the cost, for machines")
    plan.set_defaults(nnodes=None, rdzv_endpoint="")  # of `train`, which the environment may give; nobody meets here


def _train(options: Any) -> int:
    from llmtune.distributed.stopping import StopRequest, die_with_parent

    if os.environ.keys() & {"TORCHELASTIC_RUN_ID", "LLMTUNE_LAUNCHER"}:
        die_with_parent(signal.SIGTERM)  # ranks whose launcher was killed save and end
    with StopRequest():  # already while libraries are imported
        return _train_or_launch(options)


def _train_or_launch(options: Any) -> int:
    began = time.monotonic()
    from llmtune.distributed.ranks import leave, tell_the_others
    from llmtune.recipe.train_config import TrainConfig
    from llmtune.training.run_folder import occupied

    try:
        recipe = read_recipe(options)
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, TrainConfig.ddp_timeout)
        raise
    from dataclasses import replace

    from llmtune.api import launch_request  # imports torch, which the first mistake in a recipe need not wait for
    from llmtune.cli.environment import taken_from_environment
    from llmtune.contract.environment import remarks
    from llmtune.distributed.launch import parse_machines, under_launcher
    from llmtune.distributed.stopping import EXIT_INTERRUPTED
    from llmtune.recipe.parts import launcher_of
    from llmtune.recipe.registry import Registry
    from llmtune.recipe.secrets import hidden

    if not under_launcher():
        for line in [*taken_from_environment(options), *remarks()]:
            say(f"llmtune: {line}", sys.stderr)
        launcher = launcher_of(recipe, Registry())
        request = launch_request(
            recipe, [options.recipe, *options.overrides, *(["--fresh"] if options.fresh else [])], ranks=options.nproc,
            machines=parse_machines(options.nnodes, options.rdzv_endpoint, options.rdzv_id),
            restarts=options.max_restarts,
        )  # fmt: skip
        shown = tuple(map(hidden, request.command))
        if options.dry_run:
            say(launcher.describe(replace(request, command=shown)))
            return 0
        if sentence := occupied(replace(recipe, fresh=options.fresh)):
            raise PlanError(sentence)  # at once, before libraries are imported and data read
        if not launcher.waits and shown != request.command:
            raise RecipeError(
                "command line: a secret would be written into the job's script; name it in the recipe as ${oc.env:NAME}"
            )
        if launcher.starts(request):
            return launcher.launch(request)
    sys.argv[1:] = map(hidden, sys.argv[1:])  # which trackers write down by themselves
    load_libraries()
    from llmtune.cost import estimate
    from llmtune.training.report import print_outcome
    from llmtune.training.run import train_here

    outcome = train_here(replace(recipe, fresh=options.fresh), Registry(), estimate)
    print_outcome(replace(outcome, seconds=time.monotonic() - began))  # with the time that imports took
    leave()
    return EXIT_INTERRUPTED if outcome.status == "interrupted" else 0


def _plan(options: Any) -> None:
    import json

    from llmtune.cli.environment import taken_from_environment
    from llmtune.contract.environment import remarks
    from llmtune.distributed.launch import parse_machines
    from llmtune.recipe.registry import Registry

    recipe = read_recipe(options)
    for line in [*(taken_from_environment(options) if options.ranks is None else ()), *remarks()]:
        say(f"llmtune: {line}", sys.stderr)
    machines = parse_machines(options.nnodes, None, None)
    load_libraries()
    from llmtune.api import plan_for

    found = plan_for(
        recipe, Registry(), nproc=options.nproc, ranks=options.ranks, described=options.device, machines=machines
    )
    if options.json:
        print(json.dumps(found.cost.as_dict(), indent=1))
        return
    say(f"{found}\n")
    doing.info("Tracing a step without weights, to know its memory")
    say(f"{found.cost.quick_text}\n{found.cost.detail_text}")
