"""Rewards of answers that a rule calls right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune import Completion, StageContext

from .numbers import close, last_number
from .rows import require_columns

if TYPE_CHECKING:
    from . import RuleConfig


class RuleReward:
    """`right_score` for an answer that is right, `wrong_score` for any other."""

    def __init__(self, config: RuleConfig) -> None:
        self.config = config
        self.flags = re.DOTALL | (re.IGNORECASE if config.ignore_case else 0)
        self.readers: Mapping[str, Callable[[str], Any]] = {
            "exact": self._text, "number": last_number, "choice": self._choice,
        }  # fmt: skip

    def row_objection(self, columns: Mapping[str, Any]) -> str | None:
        """What a row lacks that answers to it are compared with; None where it has all."""
        config = self.config
        if config.match not in self.readers:
            return None
        if columns.get(config.column) is None:
            others = f", only {', '.join(columns)}" if columns else " nor any other beside the prompt"
            return (
                f"has no column {config.column!r} to compare answers with{others}; name the one that holds the right "
                "answer in reward_config.column, or reward answers by a function or model"
            )
        for value in entries(columns[config.column]):
            found = self._taken(value, config.column_pattern)
            if found is None:
                return f"has {value[:80]!r} as {config.column}, in which column_pattern is not found"
            if self.readers[config.match](found) is None:
                what = "number" if config.match == "number" else f"one of {', '.join(config.choices)}"
                return f"has {found[:80]!r} as {config.column}, which holds no {what}"
        return None

    def score(self, completions: Sequence[Completion], context: StageContext) -> list[float]:
        """One of the two scores for each answer. Raises DataError for a row without the column."""
        config = self.config
        require_columns(self, "rule", completions)
        return [config.right_score if self._is_right(each) else config.wrong_score for each in completions]

    def _is_right(self, completion: Completion) -> bool:
        config = self.config
        if config.match == "length":
            most = config.max_tokens
            return config.min_tokens <= len(completion.ids) and (most is None or len(completion.ids) <= most)
        said = self._taken(completion.answer, config.answer_pattern)
        if said is None or config.match == "regex":
            return said is not None
        read = self.readers[config.match]
        found = read(said)
        right = [
            read(self._taken(value, config.column_pattern) or "")
            for value in entries(completion.columns[config.column])
        ]
        if config.match == "number":
            return found is not None and any(close(found, one, config.tolerance) for one in right)
        return found is not None and found in right

    def _taken(self, text: str, pattern: str | None) -> str | None:
        """What a pattern takes of a text, the last time it is found; None where it is not."""
        if pattern is None:
            return text
        matches = list(re.finditer(pattern, text, self.flags))
        if not matches:
            return None
        return matches[-1][0] if not matches[-1].re.groups else matches[-1][1] or ""

    def _text(self, text: str) -> str:
        text = " ".join(text.split()) if self.config.ignore_space else text
        return text.casefold() if self.config.ignore_case else text

    def _choice(self, text: str) -> str | None:
        names = "|".join(re.escape(choice) for choice in sorted(self.config.choices, key=len, reverse=True))
        found = self._taken(text, rf"(?<!\w)({names})(?!\w)")
        return found and self._text(found)


def entries(value: Any) -> list[str]:
    """The right answers of a column, as texts."""
    return [str(each) for each in (value if isinstance(value, list) else [value])]
