"""Start the ranks of one machine through torch's elastic launcher."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmtune.errors import LlmtuneError

EXIT_INTERRUPTED = 75
"""Saved and stopped on request; a scheduler may run the same command again (EX_TEMPFAIL)."""


def under_launcher() -> bool:
    """Whether this process is already one of several ranks (torchrun, or `launch` below)."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m llmtune <arguments>` in `ranks` processes and wait. Returns the exit code of the first to fail."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="llmtune-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"llmtune-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.NONE, tee=Std.NONE),
        )
        threads = max(1, (os.cpu_count() or 1) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        command = [sys.executable, "-m", "llmtune", *arguments]
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as failure:
            return _first_failure(failure)
        except SignalException:
            # The launcher has passed the signal on and waited for the ranks to save.
            return EXIT_INTERRUPTED
    return 0


def _first_failure(failure: object) -> int:
    rank, first = failure.get_first_failure()  # type: ignore[attr-defined]
    if first.exitcode < 0:
        print(
            f"llmtune: rank {rank} was killed by signal {-first.exitcode}"
            + ("; most likely host memory ran out" if first.exitcode == -9 else ""),
            file=sys.stderr,
        )
        return 1
    return int(first.exitcode)


def write_temporary_recipe(recipe: dict[str, object], folder: Path) -> Path:
    """A recipe given as a mapping, as a file that other processes can read."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


class LaunchError(LlmtuneError):
    """A rank of a run failed; its own message is above."""
