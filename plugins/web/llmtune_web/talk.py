"""Models that are talked to on the page: opened once, let go when others are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import llmtune

MOST = 2
"""Models that are kept: those of two columns."""


class Talkers:
    """The opened models, and answers of theirs."""

    def __init__(self) -> None:
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._opening = threading.Lock()

    def stream(
        self, model: str, history: Sequence[Mapping[str, Any]], question: str, config: Mapping[str, Any]
    ) -> Iterator[str]:
        """The answer to a question after a history of messages, longer at each time. Raises errors of llmtune."""
        session = self._open(model)
        messages = [{"role": each["role"], "content": _text(each["content"])} for each in history]
        asked = replace(session, messages=messages, config=replace(session.config, **config))
        said = ""
        with closing(asked.stream(question)) as pieces:
            for piece in pieces:
                said += piece
                yield said

    def let_go(self) -> None:
        """Forget all models."""
        with self._opening:
            self._opened.clear()

    def _open(self, model: str) -> Any:
        with self._opening:
            if model not in self._opened:
                while len(self._opened) >= MOST:
                    self._opened.popitem(last=False)
                self._opened[model] = llmtune.open_chat(model)
            self._opened.move_to_end(model)
            return self._opened[model]


def _text(content: Any) -> str:
    """A message's text, of the parts that the page's component makes of it."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts)
