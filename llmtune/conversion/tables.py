"""The tables of `tables.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from llmtune.contract.shipped import shipped


@cache
def table(name: str) -> Mapping[str, Any]:
    """A table by its name; keys that share a row are keys of their own."""
    rows = shipped("llmtune.conversion", "tables.yaml")[name].items()
    return {key: value for keys, value in rows for key in keys.split(", ")}
