"""`llmtune serve`: from a command's words to a server that listens."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import uvicorn

from llmtune.contract.errors import PlanError
from llmtune.contract.generation import GenerateConfig, Serves, TakesMedia
from llmtune.inference.chat import parts_of
from llmtune.serving.answering import Server
from llmtune.serving.app import make_app
from llmtune.serving.config import ServeConfig, serve_config
from llmtune.serving.models import ModelOffer, offers
from llmtune.terminal import doing, say

OWN = frozenset(field.name for field in fields(ServeConfig))
GENERATION = frozenset(field.name for field in fields(GenerateConfig))


def serve(path: str, given: Mapping[str, Any]) -> None:
    """Serve what is at `path` until the process is told to stop. `given` are keys of the server, of generation, and of
    a recipe. Raises the errors of the keys and of the models."""
    config = serve_config({key: value for key, value in given.items() if key.partition(".")[0] in OWN})
    keys = {key: value for key, value in given.items() if key.partition(".")[0] not in OWN | GENERATION}
    generation = {key: given[key] for key in GENERATION & given.keys()}
    with _listening(config) as listener:  # what cannot be had is told before the weights are read
        recipe, found = offers(path, config.model_name, config.adapters, keys, generation)
        engine = parts_of(recipe, ("engine_config",)).one("engine_config")
        if not isinstance(engine.built, Serves):
            raise PlanError(f"{engine.full_label} answers no requests that come one by one, which a server needs")
        if not (isinstance(engine.built, TakesMedia) and engine.built.takes_media):
            found = [replace(each, media=None, reader=f"{each.name} with {engine.full_label}") for each in found]
        doing.info("Loading the weights")
        serving = engine.built.serve([offer.served for offer in found])
        try:
            _run(Server(found, serving, config), listener, found)
        finally:
            serving.close()


def _listening(config: ServeConfig) -> socket.socket:
    """The socket that is listened on. PlanError where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise PlanError(
            f"port: {config.host}:{config.port} cannot be listened on ({error.strerror or error}); "
            "name another with port=N, or let one be found with port=0"
        ) from None
    return listener


def _run(server: Server, listener: socket.socket, found: list[ModelOffer]) -> None:
    config, port = server.config, listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    names = ", ".join(offer.name for offer in found)
    key = "" if config.api_key is None else ", with the key"
    say(f"Serving {names} at http://{host}:{port}{config.root_path}/v1{key}. Ctrl-C stops.")
    settings = uvicorn.Config(
        make_app(server), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5,
        lifespan="off",
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[listener])
