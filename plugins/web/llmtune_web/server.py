"""The server of the page: where it listens, and who may open it."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import PlanError, RecipeError

if TYPE_CHECKING:
    from llmtune_web.command import Web

PORT = 7860
_ON = ("1", "true", "yes", "y", "on")


def serve(options: Web) -> int:
    """Serve the page until Ctrl-C. Raises PlanError where an address needs a password and none is given."""
    made = with_environment(options)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks at once
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from llmtune_web.desk import Desk
    from llmtune_web.folder import Folder
    from llmtune_web.page import make_page

    folder = Folder.of(Path.cwd(), made.folders)
    page = make_page(Desk.at(folder))
    page.queue(default_concurrency_limit=8)
    settings: dict[str, Any] = {}
    if made.user is None:  # no page of another name, pointed at this address, may ask it in a browser's name
        settings["app_kwargs"] = {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK)]}
    os.environ.pop("GRADIO_SHARE", None)
    page.launch(
        server_name=made.host, server_port=_port(made), root_path=made.root_path, quiet=True, show_error=True,
        auth=(made.user, made.password) if made.user and made.password else None, prevent_thread_lock=True,
        inbrowser=made.open, share=False, ssr_mode=False, pwa=False, mcp_server=False, footer_links=["settings"],
        allowed_paths=[], theme=theme(gr), css=resources.files("llmtune_web").joinpath("page.css").read_text("utf-8"),
        max_file_size="1mb", run_history=False, **settings,
    )  # fmt: skip
    print(f"The page is at {page.local_url}, for files below {folder.root}. Ctrl-C ends it; runs go on.", flush=True)
    page.block_thread()
    return 0


_LOOPBACK = ["localhost", "127.0.0.1", "[::1]", "::1"]


def with_environment(options: Web) -> Web:
    """The options, with what the environment says where they say nothing.

    Raises RecipeError for what is no port, PlanError for an address that others reach without a password."""
    told = os.environ.get
    port = options.port
    if port is None and (given := told("GRADIO_SERVER_PORT")):
        if not given.isdigit() or int(given) > 65535:
            raise RecipeError(f'GRADIO_SERVER_PORT: found "{given}", allowed is a whole number from 0 to 65535')
        port = int(given)
    usual = "::" if told("GRADIO_IPV6", "").lower() in _ON else "127.0.0.1"
    made = replace(
        options, host=options.host or told("GRADIO_SERVER_NAME") or usual, port=port,
        root_path=options.root_path or told("GRADIO_ROOT_PATH") or None,
        user=options.user or told("LLMTUNE_WEB_USER") or None,
        password=options.password or told("LLMTUNE_WEB_PASSWORD") or None,
    )  # fmt: skip
    if told("GRADIO_SHARE", "").lower() in _ON:
        print(
            "GRADIO_SHARE is set: the page is not sent through other people's servers; see host and root_path",
            file=sys.stderr,
        )
    if (made.user is None) != (made.password is None):
        raise PlanError("user and password: one is given without the other; give both, or none")
    if made.user is None:
        why = f"root_path {made.root_path} says that a proxy shows it to others" if made.root_path else ""
        why = why or ("" if is_loopback(made.host or "") else f"others reach {made.host}")
        if why:
            raise PlanError(
                f"user and password: not given, but {why}, and who opens the page can run code; set "
                "LLMTUNE_WEB_USER and LLMTUNE_WEB_PASSWORD, or listen on 127.0.0.1"
            )
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _port(options: Web) -> int | None:
    """The port to listen on; None lets gradio take the first free one from the usual one on. Raises PlanError where the
    one that is asked for is taken."""
    if options.port is None:
        return None
    family = socket.AF_INET6 if ":" in str(options.host) else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(options.host).strip("[]"), options.port))
        except OSError as error:
            raise PlanError(f"{options.host}:{options.port}: cannot be listened on: {error.strerror}") from error
        return int(probe.getsockname()[1])


def theme(gr: Any) -> Any:
    """Colours and type of this machine alone: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    return gr.themes.Base(
        primary_hue="emerald", neutral_hue="slate", radius_size="sm", spacing_size="sm", text_size="sm",
        font=fonts, font_mono=mono,
    ).set(  # white on the usual hue is hard to read
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
    )  # fmt: skip
