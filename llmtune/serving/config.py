"""The keys of `llmtune serve`. Nothing heavy is imported here."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from llmtune.contract.environment import variables
from llmtune.contract.errors import RecipeError, raise_all
from llmtune.contract.schema import Ge, Gt, Le, decode


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    """Address that is listened on. Any but this machine's own (127.0.0.1, ::1, localhost) needs `api_key`."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """Port that is listened on; 0 takes a free one."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer KEY`. Better given as the variable `API_KEY`: other users of the
    machine can read a command line."""
    model_name: str | None = None
    """The name that requests give the model; null is the name of its folder."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Further adapters over the same base, by the name that requests give them: runs, or folders of PEFT."""
    max_concurrent: Annotated[int, Ge(1)] = 64
    """Most answers at a time; more requests are told to come again (429)."""
    max_answer_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of an answer that a request may ask for; null is what the model has room for."""
    max_body_mb: Annotated[float, Gt(0)] = 8
    """Largest body of a request in megabytes."""
    max_media: Annotated[int, Ge(0)] = 16
    """Most pictures, videos and sounds that a request shows."""
    max_media_pixels: Annotated[int, Ge(1)] = 2**25
    """Most pixels of a picture that a request shows, or of each picture of a video, before it is made smaller: a file
    of some kilobytes may hold billions."""
    max_media_seconds: Annotated[float, Gt(0)] = 600
    """Most seconds of a sound or a video that a request shows."""
    max_decoded_pixels: Annotated[int, Ge(1)] = 2**33
    """Most pixels of all videos that a request shows, whose pictures are all decoded whatever is taken of them: five
    minutes of 1280 x 720 at 30 pictures a second."""
    allowed_media_domains: list[str] = field(default_factory=list)
    """Domains that what is shown is fetched from (`https` alone) where a request names an address; none by default, as
    the server would ask for a stranger what only it can reach."""
    allowed_local_media_path: str | None = None
    """Folder whose files a request may show by a `file://` address; null is none."""
    timeout: Annotated[float, Gt(0)] = 600
    """Most seconds that a request takes, from its arrival to its last token."""
    root_path: str = ""
    """The path before `/v1` that a proxy in front takes away."""

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ValueError("api_key: found an empty text, allowed is a key, or null for none")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached from other machines, which needs a key that clients send; set "
                "API_KEY in the environment or api_key=..., or leave host at 127.0.0.1"
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path: found {self.root_path}, allowed is a path that begins with /")


def serve_config(given: Mapping[str, Any]) -> ServeConfig:
    """The keys as they are `given`, else as the environment has them. Raises RecipeError for what is wrong."""
    named = {
        variable.serve: (name, os.environ[name])
        for name, variable in variables().items()
        if variable.serve and os.environ.get(name)
    }
    found: dict[str, Any] = {}
    for key, (name, text) in named.items():
        if key in given:
            continue
        whole = key in ("port", "max_concurrent")
        if whole and not text.isdigit():
            raise RecipeError(f"{name}: found {text}, allowed is a whole number")
        found[key] = int(text) if whole else text
    config, problems = decode(ServeConfig, {**found, **given})
    raise_all(
        [RecipeError(f"{problem.key}: {problem.message}" if problem.key else problem.message) for problem in problems]
    )
    return config


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
