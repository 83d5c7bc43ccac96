"""Wrong formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune import BadRow, Conversation, Text


class _Format:
    kind = "text"
    columns = ("body",)
    required = ("body",)

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return "body" if "body" in row else None

    def convert(self, row: Mapping[str, Any]) -> Any:
        if not isinstance(row["body"], str):
            raise BadRow("body is not text", f"found {row['body']!r}")
        return self.made(row)

    def made(self, row: Mapping[str, Any]) -> Any:
        return Text(text=row["body"])


class KnowsNoKind(_Format):
    kind = "essay"


class LiesAboutItsKind(_Format):
    def made(self, row: Mapping[str, Any]) -> Any:
        messages = [{"role": "user", "content": row["body"]}, {"role": "assistant", "content": row["body"] or "b"}]
        return Conversation(messages=messages)


class FailsOnGaps(_Format):
    def convert(self, row: Mapping[str, Any]) -> Any:
        return Text(text=row["body"].strip())


class ChangesRows(_Format):
    def made(self, row: Any) -> Any:
        row["body"] = row["body"].strip()
        return Text(text=row["body"])


class CountsRows(_Format):
    seen = 0

    def made(self, row: Mapping[str, Any]) -> Any:
        self.seen += 1
        return Text(text=f"{self.seen} {row['body']}")
