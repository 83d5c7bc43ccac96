"""Keys of other trainers' recipes: what each is called here, or why it is not here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmtune.contract.environment import variables
from llmtune.contract.shipped import shipped

ENVIRONMENT = "Environment variables"
"""The subject of those, which have a page of their own."""


@dataclass(frozen=True)
class ForeignKey:
    """A key of another trainer, and what a recipe that uses it is told."""

    subject: str
    here: str = ""
    """What to write instead; its first word is a key or a key inside a block. Empty where there is no counterpart."""
    reason: str = ""
    """Why there is no such key, and what there is."""
    use: str = ""
    """The key of llmtune, perhaps inside a block, that is set instead where a model is only used. Empty: none."""
    also: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys that `use` needs beside it, with their values."""
    anyway: Sequence[Any] = field(default=(), hash=False)
    """Values that ask for what happens without being asked for, where a model is only used."""
    beside: str = ""
    """The other trainer's key without which this one asks for nothing."""

    @property
    def answer(self) -> str:
        """The rest of a sentence that begins with `no such key`."""
        return f"; here it is {self.here}" if self.here else f": {self.reason}"


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    """Every key of another trainer that llmtune has an answer to, in the order of `foreign_keys.yaml`."""
    found: dict[str, ForeignKey] = {}
    for subject, answers in shipped("llmtune.recipe", "foreign_keys.yaml").items():
        for keys, answer in answers.items():
            said: dict[str, Any] = answer if isinstance(answer, dict) else {"reason": answer}
            made = ForeignKey(subject, **said)
            found |= dict.fromkeys(keys.split(", "), made)
    return found | {name: ForeignKey(ENVIRONMENT, reason=each.answer) for name, each in variables().items()}


def asks_nothing(foreign: ForeignKey, value: Any) -> bool:
    """Whether the value switches off what is not here, or is what happens without being asked for."""
    return is_done_anyway(foreign, value) or ((value is None or value is False) and True not in foreign.anyway)


def is_done_anyway(foreign: ForeignKey, value: Any) -> bool:
    """Whether the value is what happens without being asked for."""
    return any(type(value) is type(one) and value == one for one in foreign.anyway)


def migration_table() -> str:
    """The Markdown table of docs/migration.md: keys with one answer share a row."""
    parts = []
    subjects = dict.fromkeys(key.subject for key in foreign_keys().values())
    for subject in (subject for subject in subjects if subject != ENVIRONMENT):
        rows: dict[ForeignKey, list[str]] = {}
        for name, key in foreign_keys().items():
            if key.subject == subject:
                rows.setdefault(key, []).append(f"`{name}`")
        lines = [f"| {', '.join(names)} | {told(key)} |" for key, names in rows.items()]
        parts.append("\n".join([f"### {subject}", "| there | here |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def told(key: ForeignKey) -> str:
    """What stands here, as Markdown: its first word set as code where it is a key."""
    word, space, rest = (key.here or key.reason).replace("|", "\\|").partition(" ")
    bare = word.rstrip(",:")
    is_key = key.here and (not rest or "_" in bare)
    return f"`{bare}`{word[len(bare) :]}{space}{rest}" if is_key else word + space + rest


if __name__ == "__main__":
    page = Path(sys.argv[1])
    before = page.read_text(encoding="utf-8").partition("\n### ")[0]
    page.write_text(f"{before}\n{migration_table()}", encoding="utf-8")
