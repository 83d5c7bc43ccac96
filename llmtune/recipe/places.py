"""Where a recipe's keys were given, for errors that name the place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.contract.errors import RecipeError
from llmtune.recipe.secrets import is_secret
from llmtune.recipe.text import KeyPath, split


@dataclass(frozen=True)
class Places:
    """Says where a key was given: `recipes/my.yaml:14:3`, `command line` or `keyword argument`."""

    origin: str
    keys: Mapping[KeyPath, tuple[int, int]]
    overridden: Mapping[KeyPath, str]

    def of(self, key: str) -> str:
        """The place of a key, or of the nearest block around it. What an override replaced, is the override's."""
        path = split(key)
        around = [path[:length] for length in range(len(path), 0, -1)]
        for inner in around:
            if where := self.overridden.get(inner):
                return where
        for inner in around:
            if place := self.keys.get(inner):
                return f"{self.origin}:{place[0]}:{place[1]}"
        inside = [where for changed, where in self.overridden.items() if path and changed[: len(path)] == path]
        return inside[0] if inside else self.origin

    def error(self, key: str, message: str) -> RecipeError:
        """`recipes/my.yaml:14:3  peft_config.rnak: no such key ...`"""
        if message.startswith("found") and any(isinstance(part, str) and is_secret(part) for part in split(key)):
            message = "found something else than text (not shown); put the value in quotes"
        place = self.of(key)
        gap = " " if place in self.overridden.values() else "  "  # words read on, a line of a file stands apart
        return RecipeError(f"{place}{gap}{key}: {message}" if key else f"{self.origin}  {message}")

    def errors(self, key: str, message: str) -> list[RecipeError]:
        """One error for each line. A check over several keys has no key of its own: it puts one in front of each line,
        and the place of the other keys that the line names is told where an override gave them."""
        if key:
            return [self.error(key, message)]
        found = []
        for line in message.splitlines():
            named = re.fullmatch(r"([\w.\[\]]+): (.*)", line)
            if not named:
                found.append(self.error("", line))
                continue
            error = self.error(named[1], named[2])
            others = {where for path, where in self.overridden.items() if re.search(rf"\b{path[0]}\b", named[2])}
            others -= {self.of(named[1])}
            found.append(RecipeError(" and ".join([*sorted(others), str(error)])))
        return found
