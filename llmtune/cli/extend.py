"""`llmtune plugins`, `plugins new`, `plugins check` and `schema`: what is installed, and what it takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llmtune.cli.arguments import add_command, add_overrides
from llmtune.contract.errors import RecipeError
from llmtune.terminal import say


def add_commands(commands: Any) -> None:
    """Add what tells of plugins, and what helps to write one."""
    text = "List extension points and what is installed for them"
    plugins = add_command(commands, "plugins", _plugins, text, "Or write a plugin, or check a package of them.")
    plugins.add_argument("--json", action="store_true", help="for machines")
    inner = plugins.add_subparsers(title="commands", metavar="COMMAND", required=False)
    new = add_command(
        inner, "new", _new, "Write the package of a new plugin, which works and keeps the contract as it is"
    )
    new.add_argument("name", metavar="NAME", help="of the plugin, as recipes will write it")
    new.add_argument("--point", required=True, metavar="POINT", help="what it extends, such as peft_config")
    new.add_argument("--folder", type=Path, metavar="FOLDER", help="where the package's folder goes (default: here)")
    check = add_command(
        inner, "check", _check, "Check all plugins of an installed package against the contract",
        "Each law is checked on a tiny model, some on several processes. The exit code is 1 if one is broken.",
    )  # fmt: skip
    check.add_argument("package", metavar="PACKAGE", help="the name by which pip installed it")
    add_overrides(check, "keys of its plugins: NAME.KEY=VALUE")
    add_command(commands, "schema", _schema, "Print the JSON Schema of recipes, with the installed plugins' blocks")


def _plugins(options: Any) -> None:
    from llmtune.recipe.remembered import remembered

    if options.json:
        print(remembered("plugins-json", partial(_listing, as_json=True)))
    else:
        say(remembered("plugins", _listing))


def _listing(as_json: bool = False) -> tuple[str, bool]:
    from llmtune.recipe.listing import listing_text
    from llmtune.recipe.registry import Registry

    registry = Registry()
    return listing_text(registry.listing(), as_json), _sound(registry)


def _new(options: Any) -> None:
    from llmtune.testing.scaffold.new import new_plugin

    target = new_plugin(options.name, options.point, options.folder)
    for file in sorted(path for path in target.rglob("*") if path.is_file()):
        say(f"  {file}")
    say(f"Wrote {target}. Try: pip install -e {target} && llmtune plugins check {target.name}")


def _check(options: Any) -> int:
    from llmtune.recipe.recipe import parse_overrides

    parameters: dict[str, dict[str, Any]] = {}
    for key, value in parse_overrides(options.overrides).items():
        plugin, _, own = key.partition(".")
        if not own:
            raise RecipeError(f"command line {key}: which plugin is meant? Write NAME.{key}=VALUE")
        parameters.setdefault(plugin, {})[own] = value
    from llmtune.cli.libraries import load_libraries

    load_libraries()
    from llmtune.testing.package import check_package

    broken = check_package(options.package, parameters, say)
    say(f"{broken} broken" if broken else "All laws are kept.")
    return int(broken > 0)


def _schema(options: Any) -> None:
    from llmtune.recipe.remembered import remembered

    print(remembered("schema", _written_schema))


def _written_schema() -> tuple[str, bool]:
    import json

    from llmtune.recipe.reference import recipe_schema
    from llmtune.recipe.registry import Registry

    registry = Registry()
    return json.dumps(recipe_schema(registry), indent=2), _sound(registry)


def _sound(registry: Any) -> bool:
    """Whether all modules could be imported: why one could not, may lie anywhere on this machine."""
    return all(row.state != "broken" for row in registry.listing())
