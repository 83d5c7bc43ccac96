"""The process on a machine of the cluster that runs one rank: an actor of Ray."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llmtune import rank_environment

HANDED_ON = ("HF_", "LLMTUNE_", "NCCL_", "GLOO_", "TORCH", "PYTHON", "WANDB_", "TOKENIZERS_", "USE_")
"""How variables begin that are the same on all machines as where the run was started; of others a machine keeps what
it has, such as PATH, and gets what it lacks."""


class WorkerPlace(NamedTuple):
    """Where a worker is."""

    address: str
    port: int
    """One that is free there."""
    gpus: tuple[str, ...]
    """Those that Ray gives to the worker."""


class WorkerRank(NamedTuple):
    """Which rank a worker runs, as the arguments of `rank_environment`."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    address: str
    port: int
    launcher: str


class Worker:
    """Runs a rank in a process of its own, which has its main thread to itself and can be killed alone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def place(self) -> WorkerPlace:
        import ray

        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        return WorkerPlace(ray.util.get_node_ip_address(), port, tuple(map(str, ray.get_gpu_ids())))

    def run(
        self, command: tuple[str, ...], folder: str, given: Mapping[str, str], rank: WorkerRank, gpus: tuple[str, ...]
    ) -> Iterator[tuple[str, str] | int]:
        """("out" or "err", line) as the rank prints them, and at last its exit code."""
        handed = {name: value for name, value in given.items() if name.startswith(HANDED_ON)}
        environment = {**given, **os.environ, **handed, **rank_environment(*rank)}
        if gpus:  # all those of the machine's ranks, as each finds its own by its local rank
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        said: queue.SimpleQueue[tuple[str, str] | int] = queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(command, folder, environment, said), daemon=True).start()
        while not isinstance(each := said.get(), int):
            yield each
        yield each

    def _serve(
        self, command: tuple[str, ...], folder: str, environment: Mapping[str, str], said: queue.SimpleQueue[Any]
    ) -> None:
        """Start the rank, hand on what it prints, and wait for it: a rank ends with the thread that has started it, and
        those of Ray come and go."""
        self._process = process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        if self._stopped:  # asked before there was a process
            self.stop()

        def read(name: str, pipe: Any) -> None:
            for line in pipe:
                said.put((name, line))

        readers = [
            threading.Thread(target=read, args=each, daemon=True)
            for each in (("out", process.stdout), ("err", process.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        said.put(process.wait())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send the rank a signal."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
