"""Opened media that are asked for again and again, as of a prompt that has many answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from llmtune.contract.examples import Media
from llmtune.media.opening import Video


class KeptMedia:
    """The latest that were asked for, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._room = most_bytes
        self._held: OrderedDict[Media, Any] = OrderedDict()

    def get(self, medium: Media, opened: Callable[[Media], Any]) -> Any:
        """The opened medium, which is `opened` where it is not there."""
        if medium in self._held:
            self._held.move_to_end(medium)
            return self._held[medium]
        found = self._held[medium] = opened(medium)
        self._room -= size_of(found)
        while self._room < 0:
            _, oldest = self._held.popitem(last=False)
            self._room += size_of(oldest)
        return found


def size_of(opened: Any) -> int:
    """Bytes of a picture, a video or a sound."""
    if isinstance(opened, Video):
        return opened.frames.nbytes
    return opened.nbytes if isinstance(opened, np.ndarray) else opened.width * opened.height * 3
