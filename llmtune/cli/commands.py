"""The command line. Only this module parses arguments and decides exit codes; torch loads inside commands."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llmtune import __version__
from llmtune.cli.data import add_commands, add_overrides, add_recipe, count
from llmtune.cli.libraries import load_libraries
from llmtune.contract.errors import LlmtuneError, RecipeError, did_you_mean
from llmtune.terminal import doing, say

KEYS = "learning_rate=1e-4 peft_config.r=32"
"""Keys of a recipe, as they are written on the command line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    top = parser()
    # argparse alone would refuse key=value words that follow an option.
    options, rest = top.parse_known_args(arguments)
    if strange := [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]:
        top.error(f"unrecognized arguments: {' '.join(strange)}{_without_dashes(strange[0])}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
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


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="llmtune", description="Fine-tune language models from a short recipe.")
    top.add_argument("--version", action="version", version=f"llmtune {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int | None], text: str, more: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text}. {more}".strip())
        made.set_defaults(command=run)
        return made

    train = command(
        "train", _train, "Train as a recipe says", "An interrupted run continues when the same command is run again."
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
    plan = command(
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
    chat = command("chat", _chat, "Talk to a run, a checkpoint, a model, or a base with adapters")
    chat.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run's or a model's folder, a checkpoint, an adapter of PEFT, a hub id, or a recipe",
    )
    add_overrides(chat, "generation parameters (temperature=0.2) or recipe keys")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    predict = command(
        "predict", _predict, "Answer every row of a data set, into generated_predictions.jsonl",
        "What is written already is kept when the same command is run again.",
    )  # fmt: skip
    predict.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run's or a model's folder, a checkpoint, an adapter of PEFT, a hub id, or a recipe",
    )
    add_overrides(predict, "dataset=FILE, output_dir=FOLDER, generation parameters (max_new_tokens=64) or recipe keys")
    predict.add_argument("--nproc", type=count, metavar="N", help="ranks on this machine (default: one per GPU)")
    export = command("export", _export, "Merge an adapter into its base and write a plain model")
    export.add_argument(
        "run", metavar="RUN", help="a run's folder, a checkpoint, or a base with peft_config (or a recipe)"
    )
    add_overrides(export, "export_dir, export_size, infer_dtype, export_legacy_format, export_hub_model_id")
    reward = command("reward", _reward, "Give the rewards of a trained reward model, a line of JSON for each row")
    reward.add_argument("run", metavar="RUN", help="the folder of a run with stage_config rm, or a reward model's")
    add_overrides(reward, "dataset=FILE of conversations or preferences, recipe keys")
    add_commands(commands)
    plugins = command("plugins", _plugins, "List extension points and what is installed for them")
    plugins.add_argument("--json", action="store_true", help="for machines")
    command("schema", _schema, "Print the JSON Schema of recipes, with the installed plugins' blocks")
    return top


def _train(options: Any) -> int:
    from llmtune.distributed.stopping import StopRequest, die_with_parent

    if os.environ.keys() & {"TORCHELASTIC_RUN_ID", "LLMTUNE_LAUNCHER"}:
        die_with_parent(signal.SIGTERM)  # ranks whose launcher was killed save and end
    with StopRequest():  # already while libraries are imported
        return _train_or_launch(options)


def _train_or_launch(options: Any) -> int:
    from dataclasses import replace

    from llmtune.api import launch_request
    from llmtune.cli.environment import taken_from_environment
    from llmtune.contract.environment import remarks
    from llmtune.distributed.launch import parse_machines, under_launcher
    from llmtune.distributed.ranks import leave, tell_the_others
    from llmtune.distributed.stopping import EXIT_INTERRUPTED
    from llmtune.recipe.parts import launcher_of
    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry
    from llmtune.recipe.secrets import hidden
    from llmtune.recipe.train_config import TrainConfig

    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except (LlmtuneError, OSError) as error:
        tell_the_others(error, TrainConfig.ddp_timeout)
        raise
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
        if not launcher.waits and shown != request.command:
            raise RecipeError(
                "command line: a secret would be written into the job's script; name it in the recipe as ${oc.env:NAME}"
            )
        if launcher.starts(request):
            return launcher.launch(request)
    load_libraries()
    from llmtune.cost import estimate
    from llmtune.training.report import print_outcome
    from llmtune.training.run import train_here

    outcome = train_here(replace(recipe, fresh=options.fresh), Registry(), estimate)
    print_outcome(outcome)
    leave()
    return EXIT_INTERRUPTED if outcome.status == "interrupted" else 0


def _plan(options: Any) -> None:
    import json

    from llmtune.recipe.recipe import load_recipe
    from llmtune.recipe.registry import Registry

    recipe = load_recipe(options.recipe, options.overrides)
    load_libraries()
    from llmtune.api import plan_for

    found = plan_for(recipe, Registry(), nproc=options.nproc, ranks=options.ranks, described=options.device)
    if options.json:
        print(json.dumps(found.cost.as_dict(), indent=1))
        return
    say(f"{found}\n")
    doing.info("Tracing a step without weights, to know its memory")
    say(f"{found.cost.quick_text}\n{found.cost.detail_text}")


def _chat(options: Any) -> None:
    from dataclasses import fields

    load_libraries()
    from llmtune.inference.chat import NO_TEMPLATE, chat_loop, conversation_for, generate_config
    from llmtune.inference.reopen import open_model, recipe_of
    from llmtune.model.generation import GenerateConfig
    from llmtune.recipe.keys import top_level_keys
    from llmtune.recipe.recipe import parse_overrides

    given = parse_overrides(options.overrides)
    names = {field.name for field in fields(GenerateConfig)}
    others = {key: value for key, value in given.items() if key not in names}
    for key in others:
        if key.partition(".")[0] not in top_level_keys() and (near := did_you_mean(key, names)):
            raise RecipeError(f"command line  {key}: no such key.{near}")
    recipe = recipe_of(options.model, **others)
    config = generate_config(recipe, {key: value for key, value in given.items() if key in names})
    conversation = conversation_for(recipe, *open_model(options.model, **others), config)
    if options.prompt is None:
        chat_loop(conversation, guides=sys.stdin.isatty())
        return
    if conversation.completes:
        print(NO_TEMPLATE, file=sys.stderr)
    for piece in conversation.stream(options.prompt):
        print(piece, end="", flush=True)
    print()


def _predict(options: Any) -> int:
    from llmtune.distributed.launch import default_ranks, launch, under_launcher
    from llmtune.distributed.ranks import leave
    from llmtune.distributed.stopping import die_with_parent
    from llmtune.recipe.recipe import parse_overrides

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)
    given = parse_overrides(options.overrides)
    if not under_launcher() and (ranks := options.nproc or default_ranks(given.get("device", "auto"))) > 1:
        return launch(["predict", options.model, *options.overrides], ranks)
    load_libraries()
    from llmtune.inference.predict import predict

    found = predict(options.model, **given)
    if os.environ.get("RANK", "0") == "0":
        say(str(found))
    leave()
    return 0


def _export(options: Any) -> None:
    import json

    load_libraries()
    from llmtune.inference.export import export
    from llmtune.recipe.recipe import parse_overrides

    target = export(options.run, **parse_overrides(options.overrides))
    about, place = target / "config.json", shlex.quote(str(target))
    kinds = json.loads(about.read_text(encoding="utf-8")).get("architectures") if about.exists() else None
    judges = any("ForSequenceClassification" in kind for kind in kinds or ())
    say(f"Wrote {target}. Try: " + (f"llmtune reward {place} dataset=ROWS" if judges else f"llmtune chat {place}"))


def _reward(options: Any) -> None:
    import json

    from llmtune.recipe.recipe import parse_overrides

    given = parse_overrides(options.overrides)
    if (dataset := given.pop("dataset", None)) is None:
        raise RecipeError("dataset: not given, needed is what to score: dataset=FILE")
    load_libraries()
    from llmtune.inference.reward import rewards_of_rows

    for row in rewards_of_rows(options.run, dataset, **given):
        print(json.dumps(row))


def _plugins(options: Any) -> None:
    from llmtune.recipe.listing import print_listing
    from llmtune.recipe.registry import Registry

    print_listing(Registry().listing(), as_json=options.json)


def _schema(options: Any) -> None:
    import json

    from llmtune.recipe.reference import recipe_schema
    from llmtune.recipe.registry import Registry

    print(json.dumps(recipe_schema(Registry()), indent=2))
