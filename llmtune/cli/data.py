"""`llmtune data check`, `preview` and `stats`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.cli.arguments import add_command, add_overrides, add_recipe, count
from llmtune.cli.libraries import load_libraries
from llmtune.contract.errors import DataError, PlanError, RecipeError
from llmtune.terminal import say

if TYPE_CHECKING:
    from llmtune.data.check import DataCheck
    from llmtune.data.report import Bad

_RECIPES = (".yaml", ".yml")
_DATA = (".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".csv", ".tsv", ".txt", ".gz", ".zst")


def add_commands(commands: Any) -> None:
    """Add `data` and its commands to the parser of `llmtune`."""
    text = "Look at data: what is wrong with it, what trains, how long it is"
    data = commands.add_parser("data", help=text, description=f"{text}. No GPU is needed.")
    inner = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = add_command(inner, "check", _check, "Read every row and list those that cannot be used", (
        "Given a recipe, or model=NAME, rows are rendered with the model's template, too. The exit code is 3 if a row "
        "cannot be used, and that of the error if the model cannot be had."
    ))  # fmt: skip
    check.add_argument(
        "source", metavar="SOURCE", help="a file, folder, glob, hub:owner/name, name in dataset_info.json, or recipe"
    )
    add_overrides(
        check, "keys of the data set (columns={instruction: question}) or of a recipe (model=NAME template=qwen3)"
    )
    check.add_argument("--format", metavar="NAME", help="of the rows (default: detected)")
    check.add_argument("--dataset-dir", metavar="FOLDER", help="where dataset_info.json is")
    check.add_argument("--limit", type=count, metavar="N", help="read the first N rows only")
    check.add_argument("--all", action="store_true", help="list all bad rows, not only the first 20")
    check.add_argument("--quarantine", metavar="FILE", help="write the bad rows and their reasons as JSON Lines")
    check.add_argument("--json", action="store_true", help="for machines")

    preview = add_command(inner, "preview", _preview, "Show samples as they train, the trained tokens in colour", (
        "Where there is no colour, they stand in [[...]]."
    ))  # fmt: skip
    add_recipe(preview)
    preview.add_argument("-n", type=count, default=3, metavar="N", help="so many samples (default: 3)")
    preview.add_argument(
        "--rows", type=_rows, default=(), metavar="5,17", help="samples of these rows; or chats.jsonl:5"
    )
    preview.add_argument("--packs", action="store_true", help="show packed rows, sample by sample")
    preview.add_argument("--html", metavar="FILE", help="write a page instead")

    stats = add_command(inner, "stats", _stats, "Show lengths, fill, padding, and what cutoffs would cost")
    add_recipe(stats)
    stats.add_argument("--plot", metavar="FILE", help="draw the lengths (png, svg, pdf)")
    stats.add_argument("--json", action="store_true", help="for machines")


def _rows(text: str) -> tuple[str, ...]:
    return tuple(row.strip() for row in text.split(",") if row.strip())


def _check(options: Any) -> int:
    from contextlib import ExitStack

    results: list[DataCheck] = []
    with ExitStack() as stack:
        file = stack.enter_context(Path(options.quarantine).open("wb")) if options.quarantine else None

        def put_aside(bad: Bad) -> None:
            if file is not None:
                file.write(bad.json_line())

        for found in _checks(options, put_aside):
            results.append(found)
            if not options.json:
                say(str(found))
    if options.json:
        shown = [each.as_dict() for each in results]
        print(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1))
    elif options.quarantine:
        bad = sum(each.reasons.total() for each in results)
        print(f"Wrote {bad:,} bad rows to {options.quarantine}")
    codes = [each.exit_code for each in results]
    return DataError.exit_code if DataError.exit_code in codes else max(codes)


def _checks(options: Any, on_bad: Callable[[Bad], object]) -> Iterator[DataCheck]:
    """The data set, or those of the recipe, one after the other."""
    from llmtune.data.config import Source
    from llmtune.inference.inspect import check_data, check_recipe
    from llmtune.recipe.recipe import load_recipe, parse_overrides

    keep = None if options.all else 20
    how = {"format": options.format, "dataset_dir": options.dataset_dir, "limit": options.limit, "keep": keep}
    if options.source.endswith(_RECIPES):
        recipe = load_recipe(options.source, options.overrides)
    else:
        keys, own = parse_overrides(options.overrides), {field.name for field in fields(Source)}
        entry = {"path": options.source, **{key: value for key, value in keys.items() if key in own}}
        if not (of_recipe := {key: value for key, value in keys.items() if key not in own}):
            yield check_data(entry, on_bad=on_bad, **how)
            return
        recipe = load_recipe({"dataset": [entry], **of_recipe})
    load_libraries()
    yield from check_recipe(recipe, on_bad=on_bad, **how)


def _preview(options: Any) -> None:
    recipe = _recipe(options)
    from llmtune.inference.inspect import preview_of

    shown = preview_of(recipe, options.n, options.rows, options.packs)
    if options.html is None:
        shown.show()
        return
    Path(options.html).write_text(shown.html(), encoding="utf-8")
    print(f"Wrote {options.html}")


def _stats(options: Any) -> None:
    if options.plot:
        from llmtune.data.plot import plotting_problem

        if reason := plotting_problem():
            raise PlanError(f"plot: {reason}")
    recipe = _recipe(options)
    from llmtune.inference.inspect import stats_of

    found = stats_of(recipe)
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        say(str(found))
    if options.plot:
        found.plot(options.plot)
        if not options.json:
            print(f"\nWrote {options.plot}")


def _recipe(options: Any) -> Any:
    from llmtune.recipe.recipe import load_recipe

    if options.recipe.endswith(_DATA):
        raise RecipeError(
            f"{options.recipe}: is data, and a recipe is needed, which names a model; try `llmtune data check "
            f"{options.recipe}`, or a recipe and dataset={options.recipe}"
        )
    recipe = load_recipe(options.recipe, options.overrides)
    load_libraries()
    return recipe
