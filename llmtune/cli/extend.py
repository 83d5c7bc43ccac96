"""`llmtune plugins` and `schema`: what is installed, and what it takes."""

from __future__ import annotations

from typing import Any

from llmtune.cli.arguments import add_command


def add_commands(commands: Any) -> None:
    """Add what tells of plugins."""
    plugins = add_command(commands, "plugins", _plugins, "List extension points and what is installed for them")
    plugins.add_argument("--json", action="store_true", help="for machines")
    add_command(commands, "schema", _schema, "Print the JSON Schema of recipes, with the installed plugins' blocks")


def _plugins(options: Any) -> None:
    from llmtune.recipe.listing import print_listing
    from llmtune.recipe.registry import Registry

    print_listing(Registry().listing(), as_json=options.json)


def _schema(options: Any) -> None:
    import json

    from llmtune.recipe.reference import recipe_schema
    from llmtune.recipe.registry import Registry

    print(json.dumps(recipe_schema(Registry()), indent=2))
