"""Run a function in several real processes joined by gloo, and get their results back."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRACE_S = 10.0
"""How long ranks may go on after another has failed."""
PRELOADED = [
    "torch.distributed.fsdp", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft",
    "llmtune.training.run", "llmtune.training.report", "llmtune.cost", "llmtune.recipe.recipe", __name__,
]  # fmt: skip
"""Imported once, by a process that ranks are forked from: 5 s of a core for each rank that need not do it itself."""


def in_ranks(
    ranks: int, scratch: Path, function: Callable[..., Any], *arguments: Any, timeout_s: float = 500
) -> list[Any]:
    """`function(*arguments)` in `ranks` processes with RANK and WORLD_SIZE set; their results in rank order.

    The function must be importable (module level); of this process the ranks have the environment alone. Raises
    AssertionError with the traceback of the first rank to fail; the others, which may be waiting for it, are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch.mkdir(parents=True, exist_ok=True)
    context = _context()
    processes = [
        context.Process(target=_one, args=(rank, ranks, port, str(scratch), dict(os.environ), function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        failed = any(process.exitcode for process in processes) or any(scratch.glob("rank*.failed"))
        if failed:  # what the others have to say of it comes within a moment, or not at all
            deadline = min(deadline, time.monotonic() + GRACE_S)
    for process in processes:
        process.kill()
        process.join()
    return _results(scratch, [process.exitcode for process in processes])


def _context() -> Any:
    """Forks of a process that has imported what takes long and has done nothing else; where there may be GPUs, which do
    not survive a fork once something has asked for them, or no such process can be had, new interpreters."""
    import torch
    import torch.multiprocessing as mp

    if torch.cuda.is_available() or "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _results(scratch: Path, exit_codes: list[int | None]) -> list[Any]:
    failed = sorted(scratch.glob("rank*.failed"), key=lambda path: path.stat().st_mtime_ns)
    said = [f"rank {path.stem[4:]} failed:\n{path.read_text(encoding='utf-8')}" for path in failed]
    paths = [scratch / f"rank{rank}.pickle" for rank in range(len(exit_codes))]
    found = [path.read_bytes() if path.exists() else None for path in paths]
    for path in [*failed, *(path for path in paths if path.exists())]:
        path.unlink()
    assert not said, said[0]
    silent = [f"rank {rank} (exit code {code})" for rank, code in enumerate(exit_codes) if found[rank] is None]
    assert not silent, f"no result from {', '.join(silent)}{_guard_missing()}"
    return [pickle.loads(result) for result in found if result is not None]


def _guard_missing() -> str:
    """What to do where the script that was started would start ranks in every rank."""
    main = getattr(sys.modules["__main__"], "__file__", None)  # an interactive session has none
    if main is None or not Path(main).is_file() or "__main__" in Path(main).read_text(encoding="utf-8"):
        return ""
    return (
        f'. Each rank imports {main} before it begins, which has no `if __name__ == "__main__":`; put what starts '
        "ranks under such a line"
    )


def _one(
    rank: int, ranks: int, port: int, scratch: str, environment: dict[str, str],
    function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    gc.freeze()  # what was imported before the fork stays: it is neither searched for garbage nor copied
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # what a rank writes is read at once, and has to survive no power cut
    try:
        result = pickle.dumps(function(*arguments))
    except BaseException:
        Path(scratch, f"rank{rank}.failed").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None
    Path(scratch, f"rank{rank}.pickle").write_bytes(result)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
