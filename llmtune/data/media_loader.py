"""Batches whose pictures and sound are opened and processed by other processes, ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.batch_loader import BatchLoader, precomputed_for
from llmtune.data.batches import to_device
from llmtune.data.workers import Ahead, WorkerPool, rank_workers
from llmtune.distributed.ranks import together

if TYPE_CHECKING:
    from llmtune.contract.stages import Batch


_TAKEN = 2
"""Batches that are held ready besides those that processes are at."""


@dataclass(kw_only=True)
class BatchesAhead:
    """Batches that are being made."""

    pool: WorkerPool
    step: int = -1
    """The step that comes next."""
    batches: Ahead | None = None
    """Taken from the processes by a thread: what one of them sends may keep the loop waiting for milliseconds."""


@dataclass(frozen=True, kw_only=True)
class MediaLoader(BatchLoader):
    """Batches of a training run on rows that show media."""

    workers: int | None = None
    """Processes that make batches; None: this rank's share of the processors."""
    _ahead: list[BatchesAhead] = field(default_factory=list)
    """Once processes were started; then one."""

    def start_workers(self) -> None:
        """Start the processes; best before this one joins others."""
        if not self._ahead:
            self._ahead.append(BatchesAhead(pool=WorkerPool(self._made, self.workers or rank_workers())))

    def start(self, first_step: int = 0, cursor: dict[str, Any] | None = None, bad_rows: Path | None = None) -> None:
        """Begin to make batches."""
        self.start_workers()
        self._begin(self._ahead[0], first_step)

    def close(self) -> None:
        """End the processes."""
        for ahead in self._ahead:
            if ahead.batches is not None:
                ahead.batches.close()
            ahead.pool.close()
        self._ahead.clear()

    def step(self, step: int, device: torch.device) -> list[Batch]:
        """This rank's micro-batches of the 0-based optimiser step; always `micro_steps` of them. Collective where
        processes were started: all ranks raise what one of them meets."""
        if not self._ahead:  # a batch that is looked at before a run
            return super().step(step, device)
        (ahead,) = self._ahead
        if step != ahead.step:
            self._begin(ahead, step)
        ahead.step += 1
        assert ahead.batches is not None
        take = ahead.batches.next
        # A file that broke since is met by one rank, and the others would wait for it in the forward pass.
        found: list[Batch] = together(lambda: [take() for _ in range(self.micro_steps)])
        for batch in found:  # the processes began before anything was computed
            batch.extra = precomputed_for(self.samples, batch.sample_ids)
        return [to_device(batch, device) for batch in found]

    def _begin(self, ahead: BatchesAhead, step: int) -> None:
        items = (share for number in count(step) for share in self.shares(self.order.step_units(number)))
        if ahead.batches is not None:
            ahead.batches.close()
        ahead.step, ahead.batches = step, Ahead(ahead.pool.in_order(items), _TAKEN)

    def _made(self, share: tuple[list[int], Mapping[int, int]]) -> Batch:
        torch.set_num_threads(1)  # others compute at the same time, and threads of a forked process may hang
        return self.batch(*share)
