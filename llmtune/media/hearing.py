"""How much of a sound a model hears: processors cut what is longer, without a word."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmtune.contract.examples import BadRow

_PADDING_S = 0.1
"""Seconds that a sound may be longer: MP3 ends with some silence that is no part of it."""


class Hearing:
    """The lengths at which a processor may cut sounds, and at which it does."""

    def __init__(self, processor: Any, part: Any, answer: Callable[[np.ndarray], Mapping[str, Any]]) -> None:
        """`part` of the `processor` makes features of sounds; `answer` is all that becomes of one."""
        self.rate = int(part.sampling_rate)
        """Samples a second that the model's sound has."""
        self._answer = answer
        most = inspect.signature(type(part).__call__).parameters.get("max_length")
        said = [vars(part).get("n_samples"), most.default if most is not None else None]
        said += [self.rate * seconds for seconds in [vars(processor).get("max_audio_len")] if seconds]
        self._cuts: dict[int, bool | None] = {limit: None for limit in said if isinstance(limit, int)}

    def whole(self, sound: np.ndarray, path: str) -> np.ndarray:
        """The sound; BadRow if its end would not be heard."""
        for limit in self._cuts:
            if len(sound) > limit + _PADDING_S * self.rate and self._cut_at(limit):
                what = f"{path} takes {len(sound) / self.rate:,.1f} seconds"
                heard = f"the model hears {limit / self.rate:,.0f}"
                raise BadRow("sound beyond hearing", f"{what}, of which {heard}; cut it into parts")
        return sound

    def _cut_at(self, limit: int) -> bool:
        """Whether what follows on a sound of this length is lost: noise there leaves the same as silence."""
        if self._cuts[limit] is None:
            noise = np.random.default_rng(0).uniform(-0.5, 0.5, limit + self.rate).astype(np.float32)
            silence = np.where(np.arange(len(noise)) < limit, noise, np.float32(0))
            loud, still = self._answer(noise), self._answer(silence)
            self._cuts[limit] = all(np.array_equal(np.asarray(loud[name]), np.asarray(still[name])) for name in loud)
        return bool(self._cuts[limit])
