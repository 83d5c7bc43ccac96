"""Before anything is written: no other run is in the output folder, and every machine sees the same folder."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from llmtune.contract.errors import PlanError, listed
from llmtune.distributed.launch import LAUNCHER
from llmtune.distributed.ranks import from_all, from_first, wait_for_all
from llmtune.training.file_names import LOCK

PROBE = ".probe-"
"""How the names of files begin that machines look for in each other's folder."""
LAG_S = 5.0
"""How long a new file may take to appear on another machine, and a killed rank's lock to be let go of."""


class FolderLock:
    """Held by the first rank while it trains. The system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: int | None = None

    def take(self, patience_s: float = 0.0) -> None:
        """Raise PlanError if another process, or another run in this one, holds it for longer than `patience_s`.

        File systems that cannot lock, and systems without `fcntl`, are used without one.
        """
        try:
            import fcntl
        except ImportError:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(file)
                    raise PlanError(
                        f"output_dir: {self.path.parent} is in use by another run ({self._holder()}); "
                        "wait for it, stop it, or name another folder"
                    ) from None
                time.sleep(0.1)
            except OSError:
                os.close(file)
                return
        self._file = file
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode())

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']}, since {found['started']}"
        return "of which nothing is known"

    def release(self) -> None:
        """Let go; the file stays, as deleting it would let two runs lock two files of one name."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def require_shared(folder: Path, first: bool) -> None:
    """Raise PlanError on all ranks if a machine has another folder of that name. Collective."""
    name = from_first(f"{PROBE}{uuid.uuid4().hex}")
    if first:
        (folder / name).touch()
    wait_for_all()
    found = from_all((socket.gethostname(), _appears(folder / name)))
    if first:
        (folder / name).unlink()
    lacking = [f"{host} (rank {rank})" for rank, (host, seen) in enumerate(found) if not seen]
    if lacking:
        error = PlanError(
            f"output_dir: {folder} on {listed(lacking)} is not the folder that rank 0 on {found[0][0]} writes to; all "
            "ranks write checkpoints, so name a folder on a file system that the machines share"
        )
        error.everywhere = True
        raise error


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + LAG_S
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def launcher() -> str | None:
    """The launcher that starts, and starts again, this rank: its own name, or of torch's elastic launcher
    `host:process:its start`. None without one."""
    if LAUNCHER in os.environ:
        return os.environ[LAUNCHER]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    process, started = os.getppid(), ""
    with suppress(OSError, IndexError):
        # Field 22 of proc(5), in clock ticks since boot: process numbers are used again.
        started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{process}:{started}"
