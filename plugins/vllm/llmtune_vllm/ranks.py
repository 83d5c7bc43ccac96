"""One rank speaks with the server, and all go on with what it was told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def other_ranks() -> bool:
    """Whether there are any."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shared(value: T) -> list[T]:
    """The value of each rank. Collective."""
    if not other_ranks():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def together(work: Callable[[], T]) -> T:
    """What the work gives on this rank; an error of any rank is raised on all. Collective."""
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as met:
        error = met
    for met in shared(error):
        if met is not None:
            raise met
    return result


def on_first(work: Callable[[], T]) -> T:
    """What the work gives on the first rank, or the error that it raises there, on all. Collective."""
    if not other_ranks():
        return work()
    return shared(together(lambda: work() if distributed.get_rank() == 0 else None))[0]  # type: ignore[return-value]
