"""Several ranks in one process: threads that convert their parts of a tensor and gather from each other."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmtune.contract.load_rules import LoadRule
from llmtune.testing.contract import Broken


def convert_in_pieces(
    rule: LoadRule, source: Tensor, there: Mapping[str, Tensor], parameters: set[str], ranks: int
) -> list[Mapping[str, Tensor]] | None:
    """What `rule.convert_part` returns on each rank; None where it asks for the whole tensor, on all ranks alike."""
    gathering = Gathering(ranks)
    found: list[Any] = [None] * ranks
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = rule.convert_part(OnePart(source, there, parameters, rank, gathering))
        except BaseException as error:
            failed.append(error)
        finally:
            gathering.leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        first = next((error for error in failed if not isinstance(error, Broken)), failed[0])
        raise first
    if any(pieces is None for pieces in found):
        if any(pieces is not None for pieces in found):
            raise Broken(
                f"`convert_part` of {rule.source} returns None on some ranks only", "Decide by the shape alone"
            )
        return None
    return found


class Gathering:
    """Joins the pieces of all ranks, and notices a rank that never comes."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.rounds: dict[int, dict[int, Tensor]] = {}
        self.left = 0
        self.changed = threading.Condition()

    def leave(self) -> None:
        """A rank has finished."""
        with self.changed:
            self.left += 1
            self.changed.notify_all()

    def concatenate(self, rank: int, number: int, piece: Tensor) -> Tensor:
        """The pieces of everyone's `number`-th call, in rank order."""
        with self.changed:
            pieces = self.rounds.setdefault(number, {})
            pieces[rank] = piece
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(pieces) == self.ranks or self.left)
            if len(pieces) < self.ranks:
                raise Broken(
                    "ranks call `part.concatenate` a different number of times, which would hang a run",
                    "Call it on every rank, with an empty piece where a rank has nothing",
                )
        return torch.cat([pieces[other] for other in range(self.ranks)])


class OnePart:
    """A `TensorPart` of a rank whose rows are those that FSDP2 would give it."""

    def __init__(
        self, source: Tensor, there: Mapping[str, Tensor], parameters: set[str], rank: int, gathering: Gathering
    ) -> None:
        self.shape = tuple(source.shape)
        self._source, self._there, self._parameters = source, there, parameters
        self._rank, self._gathering, self._calls = rank, gathering, 0

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened source."""
        return self._source.reshape(-1)[start:stop].clone()

    def rows(self, target: str) -> tuple[int, int]:
        """FSDP2 splits parameters like `torch.chunk`, the last ranks may get nothing; buffers stay whole."""
        rows = self._there[target].shape[0]
        if target not in self._parameters:
            return 0, rows
        step = -(-rows // self._gathering.ranks)
        return min(self._rank * step, rows), min((self._rank + 1) * step, rows)

    def concatenate(self, piece: Tensor) -> Tensor:
        """Waits for all ranks."""
        self._calls += 1
        return self._gathering.concatenate(self._rank, self._calls, piece)
