"""A server for tests, one of whose models says what it is told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import openai
import uvicorn

from llmtune.contract.generation import NewToken
from llmtune.serving import run

KEY = "a key for tests"


@dataclass
class Scripted:
    """Says a text in the name of one model, token by token, and lets the others answer for themselves."""

    inner: Any
    tokenizer: Any
    says: str = ""
    error: Exception | None = None
    close: Any = None
    asked: list[Any] = field(default_factory=list)

    def submit(self, request: Any, deliver: Any) -> Any:
        self.asked.append(request)
        if request.model != "scripted":
            return self.inner.submit(request, deliver)
        for token in self.tokenizer.encode(self.says):
            deliver(NewToken(token))
        deliver(self.error)
        return lambda: None


@contextmanager
def serving(path: str, **given: Any) -> Iterator[Any]:
    """A server of what is at `path` in a thread, with `server`, `engine`, `client`, `port` and `url`."""
    found = SimpleNamespace()

    def keep_app(server: Any) -> Any:
        found.server = server
        server.serving = found.engine = Scripted(server.serving, server.offers[0].tokenizer)
        server.serving.close = server.serving.inner.close
        first = server.offers[0]
        server.offers.append(replace(first, served=replace(first.served, name="scripted")))
        return make_app(server)

    class Kept(uvicorn.Server):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            found.uvicorn = self

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make_app, usual = run.make_app, run.uvicorn.Server
    run.make_app, run.uvicorn.Server = keep_app, Kept
    given |= {"port": port, "api_key": KEY, "device": "cpu"}
    thread = threading.Thread(target=run.serve, args=(path, given))
    thread.start()
    try:
        while not (hasattr(found, "uvicorn") and found.uvicorn.started):
            assert thread.is_alive()
            time.sleep(0.02)
    finally:
        run.make_app, run.uvicorn.Server = make_app, usual
    found.port, found.url = port, f"http://127.0.0.1:{port}"
    found.client = openai.OpenAI(base_url=f"{found.url}/v1", api_key=KEY, max_retries=0, timeout=120)
    try:
        yield found
    finally:  # else a process in which a test has failed does not end
        found.uvicorn.should_exit = True
        thread.join()
