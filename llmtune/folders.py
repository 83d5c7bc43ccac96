"""Where llmtune keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`LLMTUNE_CACHE`, or `~/.cache/llmtune`."""
    return Path(os.environ.get("LLMTUNE_CACHE") or Path.home() / ".cache" / "llmtune")
