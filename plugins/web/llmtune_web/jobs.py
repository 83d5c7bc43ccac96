"""Commands of llmtune that the page has started: processes of their own, which outlive the page and its server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune import PlanError
from llmtune_web.folder import OWN, Folder, safe_name

_SECRET = ("LLMTUNE_WEB_PASSWORD", "LLMTUNE_WEB_USER")
_LOG = 20_000
"""Bytes of a log's end that are shown."""


@dataclass(frozen=True)
class Job:
    """A process that was started, by what is written down of it."""

    name: str
    words: tuple[str, ...]
    """Of the command line, after `llmtune`."""
    output: str
    """The folder that it writes, from the root."""
    pid: int
    born: str
    """When the system started the process, in its own units: a number may be given again to another process."""
    started: float
    """The same in seconds since 1970."""


class Jobs:
    """The processes of one folder. What was started by an earlier server is found again by its file."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.at = folder.root / OWN
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, words: Sequence[str], output: str) -> Job:
        """Run `llmtune WORDS` in the folder. Raises PlanError where a process of the page still writes `output`."""
        with self._lock:
            if (running := self.of(output)) is not None and self.runs(running):
                raise PlanError(f"{output}: is being written by `llmtune {running.words[0]}` already; stop that first")
            self.at.mkdir(exist_ok=True)
            (self.at / ".gitignore").write_text("*\n", encoding="utf-8")
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06}-{safe_name(output)}"
            environment = {key: value for key, value in os.environ.items() if key not in _SECRET}
            with (self.at / f"{name}.log").open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "llmtune", *words], cwd=self.folder.root, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
                )  # fmt: skip
            self._children[child.pid] = child
            job = Job(name, tuple(words), output, child.pid, _born(child.pid), time.time())
            partial = self.at / f".{name}.partial"
            partial.write_text(json.dumps(asdict(job)), encoding="utf-8")
            os.replace(partial, self.at / f"{name}.json")
            return job

    def of(self, output: str) -> Job | None:
        """The newest process that writes a folder."""
        return next((job for job in self.all() if job.output == output), None)

    def all(self) -> list[Job]:
        """All that were started, the newest first."""
        found: list[Job] = []
        for path in sorted(self.at.glob("*.json"), reverse=True):
            with suppress(OSError, ValueError, TypeError):  # one that a crash of the machine has emptied
                told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                found.append(Job(**told | {"words": tuple(told["words"])}))
        return found

    def runs(self, job: Job) -> bool:
        """Whether the process still runs."""
        if (child := self._children.get(job.pid)) is not None and child.poll() is not None:
            return False
        return bool(job.born) and _born(job.pid) == job.born

    def stop(self, job: Job) -> bool:
        """Ask the process to save and end, as a scheduler does (SIGTERM); False where it has ended already."""
        if not self.runs(job):
            return False
        os.kill(job.pid, signal.SIGTERM)
        return True

    def log(self, job: Job) -> str:
        """The end of what the process has printed."""
        path = self.at / f"{job.name}.log"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG))
            text = file.read().decode("utf-8", "replace")
        # A progress bar writes over its own line.
        return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")).strip("\n")


def _born(pid: int) -> str:
    """When a process was started, as the system counts it; empty where it has ended."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    except FileNotFoundError:
        if sys.platform.startswith("linux"):
            return ""
        try:
            os.kill(pid, 0)  # other systems have no such file: the number has to do
        except OSError:
            return ""
        return "unknown"
    return "" if told[0] in "ZX" else told[19]
