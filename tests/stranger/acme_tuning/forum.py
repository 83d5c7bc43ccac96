"""Threads of a forum: a post and replies with votes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune import BadRow, Conversation


class Forum:
    """The post is asked, the reply with the most votes is the answer."""

    kind = "conversation"
    columns = ("post", "replies")
    required = ("post", "replies")

    def __init__(self, config: Any) -> None:
        self.least_votes = config.least_votes

    def recognise(self, row: Mapping[str, Any]) -> str | None:
        return "post and replies" if {"post", "replies"} <= set(row) else None

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        if not isinstance(row["post"], str):
            raise BadRow("post is not text", f'"post" is {row["post"]!r}')
        replies = row["replies"]
        if not isinstance(replies, list) or not all(self._whole(reply) for reply in replies):
            raise BadRow("bad replies", '"replies" is not a list of objects with text and votes')
        good = [reply for reply in replies if reply["votes"] >= self.least_votes]
        if not good:
            raise BadRow("no good reply", f"no reply has {self.least_votes} votes")
        best = max(good, key=lambda reply: reply["votes"])
        return Conversation(
            messages=[{"role": "user", "content": row["post"]}, {"role": "assistant", "content": best["text"]}]
        )

    def _whole(self, reply: Any) -> bool:
        return isinstance(reply, Mapping) and isinstance(reply.get("text"), str) and isinstance(reply.get("votes"), int)
