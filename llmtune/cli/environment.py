"""Options of `llmtune train` and `plan` that the environment gives where the command line does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from llmtune.contract.errors import RecipeError


def taken_from_environment(options: Any) -> Iterator[str]:
    """Set what is not given in `options`, and say so in a line for each. Raises RecipeError for no number."""
    given = {name: os.environ[name] for name in ("NPROC_PER_NODE", "NNODES", "MASTER_ADDR") if os.environ.get(name)}
    if options.nproc is None and "NPROC_PER_NODE" in given:
        number = given["NPROC_PER_NODE"]
        if not number.isdigit() or int(number) < 1:
            raise RecipeError(
                f'NPROC_PER_NODE: found "{number}", allowed is a whole number >= 1; set it, or give --nproc'
            )
        options.nproc = int(number)
        yield f"NPROC_PER_NODE is taken for --nproc {number}"
    if options.nnodes is None and given.get("NNODES", "1") != "1":
        options.nnodes = given["NNODES"]
        yield f"NNODES is taken for --nnodes {options.nnodes}"
    if options.rdzv_endpoint is None and options.nnodes not in (None, "1") and "MASTER_ADDR" in given:
        options.rdzv_endpoint = f"{given['MASTER_ADDR']}:{os.environ.get('MASTER_PORT') or 29500}"
        yield f"MASTER_ADDR and MASTER_PORT are taken for --rdzv-endpoint {options.rdzv_endpoint}"
