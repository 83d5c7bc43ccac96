"""`llmtune web` as a process, and what its tests wait for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Server:
    """`llmtune web` in a folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", "web", "port=0"], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.url = ""

    def wait(self) -> Server:
        """The server, once it answers."""
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"at (http://\S+/), for files below", line):
                self.url = found[1]
                return self
        raise AssertionError(said)

    def client(self, **options: Any) -> Any:
        from gradio_client import Client

        return Client(self.url, verbose=False, analytics_enabled=False, **options)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def wait_for(done: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return found


def status(folder: Path, run: str) -> str:
    record = folder / run / "run.json"
    return json.loads(record.read_text())["status"] if record.exists() else ""


def steps_of(folder: Path, run: str) -> list[int]:
    file = folder / run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []
