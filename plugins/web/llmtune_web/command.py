"""`llmtune web`: recipes, data, plans, runs, chat and export in a page of the browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from llmtune import Ge, Le


@dataclass(frozen=True, kw_only=True)
class Web:
    """Serve a page on which recipes are written, data looked at, runs started and watched, and models talked to.

    It shows files below the folder that it is started in, and no others. Whoever can open it can run what llmtune runs.
    """

    host: str | None = None
    """Address to listen on: GRADIO_SERVER_NAME, else 127.0.0.1. Any but a loopback one needs a user and a password."""
    port: Annotated[int, Ge(0), Le(65535)] | None = None
    """Port to listen on: GRADIO_SERVER_PORT, else 7860; 0 takes any that is free."""
    user: str | None = None
    """Name to log in with: LLMTUNE_WEB_USER."""
    password: str | None = None
    """Password to log in with: LLMTUNE_WEB_PASSWORD, which other users of the machine cannot see, as they can this."""
    root_path: str | None = None
    """Path under which a reverse proxy serves the page: GRADIO_ROOT_PATH. Needs a user and a password."""
    folders: tuple[Path, ...] = ()
    """Further folders that recipes may read from, such as one of models."""
    open: bool = False
    """Open the page in the browser of this machine."""

    def run(self: Any) -> int:
        """Serve until Ctrl-C."""
        from llmtune_web.server import serve

        return serve(self)
