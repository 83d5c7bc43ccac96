"""A run on a Ray cluster: a placement group of workers, one rank each, started again where one dies."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtune import LaunchError, LaunchRequest

from . import RayConfig
from .worker import Worker, WorkerPlace, WorkerRank

_PATIENCE_S = 10.0
"""How long ranks may take to end once another one has failed."""
_LOST = -signal.SIGKILL
"""The exit code of a rank whose worker is gone."""


class Ray:
    """A `Launcher` whose ranks are workers of Ray."""

    waits = True

    def __init__(self, config: RayConfig) -> None:
        self.config = config

    def ranks(self, request: LaunchRequest) -> int:
        return request.ranks or self.config.ray_num_workers

    def starts(self, request: LaunchRequest) -> bool:
        return True

    def describe(self, request: LaunchRequest) -> str:
        how = f"{self.config.placement_strategy}, {_text(self.config.resources) or 'one GPU or CPU'} each"
        return (
            f"{self.ranks(request)} workers of Ray ({how}), each of which runs\n{shlex.join(request.command)}\n"
            f"started again up to {self._restarts(request)} times"
        )

    def launch(self, request: LaunchRequest) -> int:
        with _signals() as asked, self._cluster(request) as group:
            launcher, code = f"ray-{uuid.uuid4().hex}", 0
            for start in range(self._restarts(request) + 1):
                if start:
                    print(f"llmtune: a worker died; starting all {self.ranks(request)} again", file=sys.stderr)
                code = _Attempt(self.config, request, group, launcher, start, asked).run()
                # Other exit codes are llmtune's own: what stopped the run would stop it again.
                if asked.is_set() or (code >= 0 and code != 1):
                    break
            return code if code >= 0 else 1

    def _restarts(self, request: LaunchRequest) -> int:
        return self.config.max_restarts if request.restarts is None else request.restarts

    @contextmanager
    def _cluster(self, request: LaunchRequest) -> Iterator[Any]:
        """A placement group for the workers, on the cluster that there is or on one of this process."""
        import ray
        from ray.util import remove_placement_group

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = not ray.is_initialized()
        if own:
            ray.init(**{"log_to_driver": False, "logging_level": "warning", **self.config.ray_init_kwargs})
        try:
            group = self._group(request)
            yield group
            remove_placement_group(group)
        finally:
            if own:
                ray.shutdown()

    def _group(self, request: LaunchRequest) -> Any:
        import ray
        from ray.util import placement_group, remove_placement_group

        there, workers = ray.cluster_resources(), self.ranks(request)
        each = dict(self.config.resources) or {"GPU": 1.0}
        if not self.config.resources and (request.device == "cpu" or not there.get("GPU")):
            each = {"CPU": 1.0}
        each = {name: amount for name, amount in each.items() if amount}
        group = placement_group(
            [each] * workers, strategy=self.config.placement_strategy, name=self.config.ray_run_name or request.name
        )
        grows = "address" in self.config.ray_init_kwargs or "RAY_ADDRESS" in os.environ
        lacks = any(there.get(name, 0.0) < amount * workers for name, amount in each.items())
        if not group.wait(timeout_seconds=self.config.wait_s if grows or not lacks else 0):
            remove_placement_group(group)
            has = _text({name: there.get(name, 0.0) for name in each})
            raise LaunchError(
                f"launch_config: {workers} workers of Ray take {_text(each)} each ({self.config.placement_strategy}), "
                f"and the cluster has {has} in all; lower ray_num_workers or resources_per_worker, or add machines"
            )
        return group


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


class _Attempt:
    """One start of all workers."""

    def __init__(
        self, config: RayConfig, request: LaunchRequest, group: Any, launcher: str, number: int, asked: threading.Event
    ) -> None:
        self.config, self.request, self.launcher, self.number, self.asked = config, request, launcher, number, asked
        self.workers = [_actor(group, index) for index in range(group.bundle_count)]
        self.printed: queue.SimpleQueue[tuple[int, tuple[str, str] | int]] = queue.SimpleQueue()

    def run(self) -> int:
        """The exit code of the first rank that failed, below 0 for one that was killed; 0 where none did."""
        import ray

        try:
            places = ray.get([worker.place.remote() for worker in self.workers])
        except ray.exceptions.RayError as error:
            raise LaunchError(f"launch_config: a worker of Ray did not start: {str(error).splitlines()[0]}") from error
        for worker, rank, gpus in zip(self.workers, *_arranged(places, self.launcher), strict=True):
            output = worker.run.options(num_returns="streaming").remote(
                self.request.command, os.getcwd(), dict(os.environ), rank, gpus
            )
            threading.Thread(target=self._follow, args=(rank.rank, output), daemon=True).start()
        try:
            return self._until_all_have_ended()
        finally:
            for worker in self.workers:
                ray.kill(worker)

    def _follow(self, rank: int, output: Any) -> None:
        """Hand on what a rank prints; the end of its worker is its end."""
        import ray

        last: tuple[str, str] | int = _LOST
        with suppress(ray.exceptions.RayError):
            for reference in output:
                last = ray.get(reference)
                self.printed.put((rank, last))
        if not isinstance(last, int) or last == _LOST:
            self.printed.put((rank, _LOST))

    def _until_all_have_ended(self) -> int:
        codes: dict[int, int] = {}
        failed, told, deadline = 0, False, float("inf")
        with self._logs() as write:
            while len(codes) < len(self.workers) and time.monotonic() < deadline:
                if self.asked.is_set() and not told:
                    told = True
                    self._stop()
                try:
                    rank, said = self.printed.get(timeout=0.2)
                except queue.Empty:
                    continue
                if isinstance(said, tuple):
                    write(rank, *said)
                    continue
                codes.setdefault(rank, said)
                if said and not failed:
                    failed = said
                    if not told:
                        self._stop()
                        deadline = time.monotonic() + _PATIENCE_S
        return failed

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop.remote()

    @contextmanager
    def _logs(self) -> Iterator[Callable[[int, str, str], None]]:
        """Writes what ranks print to this process's streams, and to files where the recipe wants them."""
        files = []
        if self.config.ray_storage_path:
            folder = Path(self.config.ray_storage_path).expanduser() / (self.config.ray_run_name or self.request.name)
            folder.mkdir(parents=True, exist_ok=True)
            names = [f"start-{self.number}-rank-{rank}.log" for rank in range(len(self.workers))]
            files = [(folder / name).open("w", encoding="utf-8") for name in names]

        def write(rank: int, stream: str, line: str) -> None:
            print(line, end="", file=sys.stdout if stream == "out" else sys.stderr, flush=True)
            if files:
                files[rank].write(line)

        try:
            yield write
        finally:
            for file in files:
                file.close()


def _actor(group: Any, index: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    takes = dict(group.bundle_specs[index])
    return ray.remote(Worker).options(
        num_cpus=takes.pop("CPU", 0), num_gpus=takes.pop("GPU", 0), resources=takes, max_concurrency=4,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    ).remote()  # fmt: skip


def _arranged(places: Sequence[WorkerPlace], launcher: str) -> tuple[list[WorkerRank], list[tuple[str, ...]]]:
    """The rank of each worker, those of a machine one after another, and the GPUs of its machine's ranks."""
    machines = list(dict.fromkeys(place.address for place in places))
    order = sorted(range(len(places)), key=lambda index: machines.index(places[index].address))
    first, ranks, gpus = places[order[0]], {}, {}
    for number, index in enumerate(order):
        here = [other for other in order if places[other].address == places[index].address]
        address, port = first.address, first.port
        ranks[index] = WorkerRank(number, len(places), here.index(index), len(here), address, port, launcher)
        gpus[index] = tuple(gpu for other in here for gpu in places[other].gpus[:1])
    return [ranks[index] for index in range(len(places))], [gpus[index] for index in range(len(places))]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set where SIGTERM or Ctrl-C asks the run to stop; a second Ctrl-C raises KeyboardInterrupt. Ray takes the
    handlers for itself when it is imported, so it is imported before."""
    import ray  # noqa: F401

    asked = threading.Event()

    def handle(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
