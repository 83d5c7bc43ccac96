"""What of a recipe is written down: secrets blanked out, text that would be resolved again escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmtune.recipe import text as recipe_text
from llmtune.recipe.text import Text

SECRETS = frozenset({"token", "access_token", "auth_token", "api_key", "password", "secret"})
"""Keys, at any depth, whose values are written nowhere."""


def escaped(value: Any) -> Any:
    """A copy whose `${` stays as it is when the recipe is read again."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def blank(value: Any, secret: bool = False) -> Any:
    """A copy with null for secret values, except those that only say where to find them (`${...}`)."""
    if isinstance(value, Mapping):
        return {key: blank(item, key in SECRETS) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item, secret) for item in value]
    return None if secret and not str(value).startswith("${") else value


def blank_text(found: Text, tree: Mapping[str, Any]) -> str:
    """The file's text with secret values replaced by null."""
    text = found.text
    secret = {span for path, span in found.spans.items() if SECRETS & set(path)}
    if not secret and blank(tree) != tree:  # no places are known: JSON with tabs
        return recipe_text.dump(blank(tree))
    for start, stop in sorted(secret, reverse=True):
        if not text[start:stop].strip("\"'").startswith("${"):
            text = text[:start] + "null" + text[stop:]
    return text
