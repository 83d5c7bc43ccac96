"""`llmtune tally`: how many lines of a file hold a word. A command needs no plugin of an extension point beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmtune import DataError, Ge


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Count the lines of a file that hold a word."""

    path: Path
    """The file."""
    word: str = "llm"
    """What is looked for."""
    least: Annotated[int, Ge(0)] = 0
    """With fewer lines than this, the exit code is 1."""

    def run(self) -> int:
        if not self.path.is_file():
            raise DataError(f"path: found nothing at {self.path}, allowed is a file")
        count = sum(self.word in line for line in self.path.read_text(encoding="utf-8").splitlines())
        print(f"{count} lines hold {self.word}")
        return int(count < self.least)
