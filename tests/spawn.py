"""Run a function in several real processes joined by gloo, and get their results back."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_ranks(
    ranks: int, scratch: Path, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240
) -> list[Any]:
    """`function(*arguments)` in `ranks` fresh processes with RANK and WORLD_SIZE set; their results in rank order.

    The function must be importable (module level). Raises AssertionError with the traceback of the first rank to fail.
    """
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_one, args=(rank, ranks, port, str(scratch), function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        process.kill()
    results = []
    for rank, process in enumerate(processes):
        path = scratch / f"rank{rank}.pickle"
        assert path.exists(), f"rank {rank} left no result (exit code {process.exitcode})"
        kind, value = pickle.loads(path.read_bytes())
        path.unlink()
        assert kind == "ok", f"rank {rank} failed:\n{value}"
        results.append(value)
    return results


def _one(
    rank: int, ranks: int, port: int, scratch: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    try:
        result = ("ok", function(*arguments))
    except BaseException:
        result = ("error", traceback.format_exc())
    Path(scratch, f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
