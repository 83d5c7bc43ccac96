"""Names that were meant to be another one: columns of a row, keys of a message."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import lru_cache

_ALIKE = 0.8
"""One or two letters of a word; `text`, `id`, `category` are nobody's misspelling."""
_WORD_ALIKE = 0.75
"""The same of each word: `rejected_reason` is not `rejected_response`."""


@lru_cache(maxsize=4096)
def misspelt(found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    """The first name of `found` that is nearly one of `known` which is not there, and that one."""
    absent = [name for name in known if name not in found]
    for name in found:
        if name in known:
            continue
        near = max(absent, key=lambda other: _alike(name, other), default=None)
        if near is not None and is_like(name, near):
            return name, near
    return None


def is_like(name: str, meant: str) -> bool:
    """Whether `name` is `meant` but for a few letters; `prompt_id` and `promptId` are names of their own."""
    if _alike(name, meant) < _ALIKE:
        return False
    words, others = _words(name), _words(meant)
    if len(words) != len(others):
        return "".join(words) == "".join(others)
    longer, shorter = sorted((name.lower(), meant.lower()), key=len, reverse=True)
    if len(longer) - len(shorter) > 1 and (longer.startswith(shorter) or longer.endswith(shorter)):
        return False
    return all(_alike(one, other) >= _WORD_ALIKE for one, other in zip(words, others, strict=True))


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(" ", "_").split("_")


def as_names(names: Iterable[object]) -> tuple[str, ...]:
    """Names in the order of the row, as text."""
    return tuple(str(name) for name in names)
