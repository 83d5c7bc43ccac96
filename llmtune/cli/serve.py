"""`llmtune serve`: an API like OpenAI's for what was trained."""

from __future__ import annotations

from typing import Any

from llmtune.cli.arguments import add_command, add_model, add_overrides
from llmtune.cli.libraries import load_libraries
from llmtune.contract.errors import PlanError


def add_commands(commands: Any) -> None:
    """Add what serves."""
    serve = add_command(
        commands, "serve", _serve, "Answer requests as OpenAI's API does, with a run, a checkpoint or a model",
        "It listens on this machine alone unless host=... and an API key say otherwise.",
    )  # fmt: skip
    add_model(serve)
    add_overrides(
        serve, "host, port, api_key, model_name, adapters, generation parameters (max_new_tokens=256), or recipe keys"
    )


def _serve(options: Any) -> None:
    from dataclasses import fields

    from llmtune.contract.generation import GenerateConfig
    from llmtune.recipe.keys import require_no_slip
    from llmtune.recipe.recipe import parse_overrides
    from llmtune.serving.config import ServeConfig, serve_config

    given = parse_overrides(options.overrides)
    own = {field.name for field in fields(ServeConfig)}
    names = own | {field.name for field in fields(GenerateConfig)}
    require_no_slip([key for key in given if key.partition(".")[0] not in names], names, "command line ")
    serve_config({key: value for key, value in given.items() if key.partition(".")[0] in own})
    load_libraries()
    try:
        from llmtune.serving.run import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client"):
            raise
        raise PlanError(f"llmtune serve needs {error.name}; install it with: pip install 'llmtune[serve]'") from None
    serve(options.model, given)
