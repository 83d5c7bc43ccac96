"""Where parts of a text stand in what a processor makes of it, which has more in the places of media."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

Span = tuple[int, int]
"""The first character, and the one after the last."""


def keeping_texts(tokenizer: Any, read: list[Any]) -> Any:
    """A copy of a tokenizer that puts all that it is asked to read into `read`."""
    kind = type(tokenizer)

    def asked(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        read.append(text)
        return kind.__call__(self, text, *args, **options)

    found = copy.copy(tokenizer)
    found.__class__ = type(kind.__name__, (kind,), {"__call__": asked})
    return found


def by_replacements(whole: str, text: str, spans: Sequence[Span], replaced: Sequence[Mapping[str, Span]]) -> list[Span]:
    """Where the `spans` of `text`, none of which a medium stands in, are in the `whole` that a processor made of it by
    what it says that it `replaced`; none where it made more of it than it says."""
    ends = [each["span"][1] for each in replaced]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replaced)]
    moved = [(start, stop, gained[bisect_right(ends, start)]) for start, stop in spans]
    same = all(whole[start + by : stop + by] == text[start:stop] for start, stop, by in moved)
    return [(start + by, stop + by) for start, stop, by in moved] if same else []


def by_runs(whole: str, text: str, spans: Sequence[Span], marks: Sequence[str]) -> list[Span]:
    """The same of a processor that writes what it likes in the places of `marks` and around them; none where it cannot
    be told.

    The runs of text between marks stand in the whole in their order. A run's place is known where the first one that
    it may have is the last one, too.
    """
    found = re.finditer("|".join(map(re.escape, marks)) or "$^", text)
    bounds = [0, *(at for mark in found for at in mark.span()), len(text)]
    runs = [_stripped(text, *run) for run in zip(bounds[::2], bounds[1::2], strict=True)]
    first: list[int] = []
    last: list[int] = []
    begin, end = 0, len(whole)
    for start, stop in runs:
        first.append(whole.find(text[start:stop], begin))
        begin = first[-1] + stop - start
    for start, stop in reversed(runs):
        last.insert(0, whole.rfind(text[start:stop], 0, end))
        end = last[0]
    if -1 in first or -1 in last:
        return []
    known = [(run, at - run[0]) for run, at, latest in zip(runs, first, last, strict=True) if at == latest]
    places = [
        (start + by, stop + by)
        for start, stop in spans
        for (run_start, run_stop), by in known
        if run_start <= start and stop <= run_stop
    ]
    return places if len(places) == len(spans) else []


def _stripped(text: str, start: int, stop: int) -> Span:
    """The bounds of a run without the spaces at its ends, which a processor may add to or take."""
    run = text[start:stop]
    first = start + len(run) - len(run.lstrip())
    return first, first + len(run.strip())
