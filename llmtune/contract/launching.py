"""Who starts the processes of a run: what a launcher is asked, and what it keeps to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a run, as the command line gives them."""

    least: int = 1
    most: int = 1
    endpoint: str | None = None
    """`HOST:PORT` where the machines meet; the one that has HOST keeps the meeting place."""
    given: bool = False
    """Whether the command line says how many; else a launcher's own keys do."""
    run_id: str = "llmtune"
    """Tells runs that meet at the same endpoint apart."""


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """A run that is to be started. What the command line says wins over a launcher's own keys."""

    command: tuple[str, ...]
    """What every rank runs in the folder of this process: the interpreter and its arguments."""
    name: str
    """Of the recipe."""
    output_dir: Path
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The recipe's key."""
    ranks: int | None = None
    """`--nproc`, ranks on each machine; None leaves it to the launcher."""
    machines: Machines = field(default_factory=Machines)
    restarts: int | None = None
    """`--max-restarts`, how often ranks are started again after one has failed; None leaves it to the launcher."""


class Launcher(Protocol):
    """What starts the ranks of a run. Every rank gets the variables of `llmtune.rank_environment`."""

    waits: bool
    """Whether `launch` returns when the ranks have ended; False where it only hands the run over."""

    def ranks(self, request: LaunchRequest) -> int | None:
        """How many processes the run has on all machines; None: as many as this machine has GPUs, or one."""
        ...

    def starts(self, request: LaunchRequest) -> bool:
        """Whether the run has other processes than the one that asks, which otherwise trains itself."""
        ...

    def describe(self, request: LaunchRequest) -> str:
        """What `launch` would run, for `--dry-run`. Starts nothing, writes nothing."""
        ...

    def launch(self, request: LaunchRequest) -> int:
        """Start the ranks, show what they print, and return the exit code of the first that fails, 0 where none does.

        When a rank fails, the others are ended; all are started again as often as `restarts` allows. SIGTERM and
        Ctrl-C are passed on as SIGTERM, and the ranks may take their time to save. Raises LlmtuneError where nothing
        can be started.
        """
        ...
