"""What of a recipe is written down: secrets blanked out, text that would be resolved again escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmtune.contract.errors import RecipeError
from llmtune.recipe import text as recipe_text
from llmtune.recipe.text import RecipeText, split

_SECRET = re.compile(
    r"(?i)(^|_)(api_?keys?|(access|private)_?key|secret\w*|passw(or)?d|passphrase|credentials?|webhook(_url)?|(proxy_)?authorization|"
    r"cookie|token$)($|_)"
)
_OF_TEXT = re.compile(
    r"(?i)(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|start|end|begin|image|video|audio|special|first|last|next|new|per|"
    r"each|turn|chat|think|tool|prefix|suffix|separator|padding|sentinel|boi|eoi|fim)_token$"
)
"""Tokens that a tokenizer has, not a hub."""


def is_secret(key: str) -> bool:
    """Whether the value of a key, at any depth, is one to write nowhere: a hub's token, an API key, a password; of HTTP
    headers, too, whose names have hyphens."""
    key = key.replace("-", "_")
    return bool(_SECRET.search(key)) and not _OF_TEXT.search(key)


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
        return {key: blank(item, is_secret(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item, secret) for item in value]
    return None if secret and not str(value).startswith("${") else value


def blank_text(found: RecipeText) -> str:
    """The file's text with secret values replaced by null."""
    text = found.text
    secret = {span for path, span in found.spans.items() if any(is_secret(str(part)) for part in path)}
    for start, stop in sorted(secret, reverse=True):
        if not text[start:stop].strip("\"'").startswith("${"):
            text = text[:start] + "null" + text[stop:]
    return text


def hidden(word: str) -> str:
    """A word of the command line, `<hidden>` in place of a value that is secret or holds something secret."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    try:
        given = recipe_text.parse_value(value, key)
    except RecipeError:
        given = value
    secret = any(is_secret(str(part)) for part in split(key)) or blank(given) != given
    return f"{key}=<hidden>" if secret else word
