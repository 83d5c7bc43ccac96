"""Processes of a run: who am I, how many are we, sums over all. `Ranks` is made of the launcher's variables here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from llmtune.contract.errors import LlmtuneError, PlanError
from llmtune.contract.records import ParallelDims

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    dims: ParallelDims = field(default=None)  # type: ignore[assignment]
    """How all ranks are arranged; left out, each has a batch of its own."""

    def __post_init__(self) -> None:
        if self.dims is None:
            object.__setattr__(self, "dims", ParallelDims(shard=self.size))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def batch_rank(self) -> int:
        """Which share of a batch this rank has; ranks of one context or tensor group have the same."""
        return self.rank // (self.dims.context * self.dims.tensor)

    @property
    def batch_ranks(self) -> int:
        """How many shares a batch has."""
        return self.dims.replicate * self.dims.shard

    @property
    def context_rank(self) -> int:
        """Which piece of each row this rank has."""
        return self.rank // self.dims.tensor % self.dims.context

    @property
    def stream(self) -> int:
        """The same number on ranks that must draw the same random numbers: a tensor group computes one result."""
        return self.rank // self.dims.tensor


def ranks_from_environment() -> Ranks:
    """As `torchrun` (torch.distributed.elastic) sets it; one process where it does not."""
    return Ranks(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU where there is one. Raises PlanError for a GPU that is not there."""
    import torch

    count = torch.cuda.device_count()
    if wanted == "cuda" and not count:
        raise PlanError(
            'device: found "cuda", but torch sees no GPU; use device: auto or install a CUDA build of torch'
        )
    if wanted == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise PlanError(
            f"rank {local_rank} of this machine has no GPU of its own: {count} found; use --nproc {count} or fewer"
        )
    return torch.device("cuda", local_rank)


def join(ranks: Ranks, device: torch.device, timeout_s: int = 1800, alone: bool = False) -> None:
    """Make the process group of a distributed run; nothing where there is one already, or for a single process that
    does not ask for a group of its own (`alone`).

    It outlasts the run: a second group on the same rendezvous store would meet the keys of the first.
    """
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized() or not (ranks.size > 1 or alone):
        return
    # Shards that are offloaded to host memory are summed there.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if ranks.size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def leave() -> None:
    """End the process group of a finished run, all ranks together: gloo's threads abort a process that exits otherwise.

    Not from `atexit`, which runs when those threads can no longer be joined (seen: two of six exits with SIGABRT).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def total(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; unchanged for one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """A barrier; nothing for one rank."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Rank 0's value of a small picklable object, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """A small picklable object of every rank, in rank order, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def fail_together(error: Exception | None) -> None:
    """Raise on every rank the first error that any of them met; nothing where all met none. Collective.

    A rank that left on its own would let those on other machines wait for it until they time out.
    """
    import socket

    met = from_all((error, socket.gethostname()))
    for rank, (found, host) in enumerate(met):
        if found is None:
            continue
        if isinstance(found, LlmtuneError):
            found.everywhere = len(met) > 1
            if any(str(other) != str(found) for other, _ in met):
                found.where = f"rank {rank} on {host}: "
        raise found


@contextmanager
def failing_together(spread: bool = True) -> Iterator[None]:
    """An error inside is raised on every rank, as by `fail_together`; unless work is `spread` on this one alone.
    Collective where it is."""
    error: Exception | None = None
    try:
        yield
    except Exception as met:
        error = met
    if spread:
        fail_together(error)
    elif error is not None:
        raise error


def together(work: Callable[[], Result]) -> Result:
    """The result of `work`; or, on every rank, the error that one of them met. Collective."""
    with failing_together():
        result = work()
    return result


def tell_the_others(error: Exception, timeout_s: int) -> None:
    """Meet the other ranks on the way out, and raise `error`; alone where they do not come.

    On one machine the launcher stops them, so there a minute is enough for the message to be said once.
    """
    ranks = ranks_from_environment()
    if ranks.size == 1:
        raise error
    import torch

    one_machine = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.size)) == str(ranks.size)
    try:
        join(ranks, torch.device("cpu"), min(timeout_s, 60) if one_machine else timeout_s)
    except RuntimeError:
        raise error from None
    fail_together(error)


def first_does(work: Callable[[], Any]) -> Any:
    """Do something on rank 0 alone; every rank gets the result, or raises the same error of llmtune."""
    import torch.distributed as dist

    result: Any = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except LlmtuneError as error:
            result = error
    result = from_first(result)
    if isinstance(result, LlmtuneError):
        result.everywhere = dist.is_initialized() and dist.get_world_size() > 1
        raise result
    return result


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Stop on all ranks if they were started with different recipes, plugins or data."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    everyone = from_all(dict(facts))
    for rank, other in enumerate(everyone):
        for key in [*facts, *other]:
            if other.get(key) == everyone[0].get(key):
                continue
            error = PlanError(
                f"ranks disagree on {key}: rank 0 has {_short(everyone[0].get(key))}, rank {rank} has "
                f"{_short(other.get(key))}; install the same packages and use the same files on all machines"
            )
            error.everywhere = True
            raise error


def _short(value: Any, most: int = 200) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."
