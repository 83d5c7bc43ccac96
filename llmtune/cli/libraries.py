"""The libraries that take seconds to import, on their way in."""

from __future__ import annotations

import os

from llmtune.terminal import doing, quiet_imports, show_doing


def load_libraries() -> None:
    """Import torch and transformers, and say so, as everything that takes a while from here on. Of several ranks the
    first says it."""
    if os.environ.get("RANK", "0") == "0":
        show_doing()
    doing.info("Importing torch and transformers")
    quiet_imports()
    from transformers.utils import logging

    # transformers' bars for loading and writing files say nothing that our own lines do not.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
