"""Models that are talked to on the page: opened once, let go when others are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import llmtune
from llmtune import PlanError

MOST = 2
"""Models that are kept: those of two columns."""


class Talkers:
    """The opened models, and conversations with them."""

    def __init__(self) -> None:
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._opening = threading.Lock()

    def session(
        self, model: str, messages: Sequence[Mapping[str, Any]], config: Mapping[str, Any], tools: Any = None
    ) -> Any:
        """A conversation with a model after these messages, with these tools if any. Raises errors of llmtune."""
        opened = self._open(model)
        session = replace(opened, messages=list(messages), config=replace(opened.config, **config))
        if tools:
            if session.offer is None:
                raise PlanError("tools: the model has no chat template, which writes them")
            session.tools = session.offer(tools)
        return session

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
