"""The tables of `tables.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def table(name: str) -> Mapping[str, Any]:
    """A table by its name; keys that share a row are keys of their own."""
    text = resources.files("llmtune.conversion").joinpath("tables.yaml").read_text(encoding="utf-8")
    rows = yaml.safe_load(text)[name].items()
    return {key: value for keys, value in rows for key in keys.split(", ")}
