"""Start the ranks of one machine, alone or as one of several, through torch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.contract.errors import LlmtuneError, RecipeError
from llmtune.contract.launching import LaunchRequest, Machines
from llmtune.distributed.stopping import EXIT_INTERRUPTED
from llmtune.terminal import FROM_NOTEBOOK, in_notebook


def under_launcher() -> bool:
    """Whether this process is already one of several ranks (torchrun, or `launch` below)."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


LAUNCHER = "LLMTUNE_LAUNCHER"
"""The variable by which ranks know the launcher that starts them, and starts them again."""

_ALONE = Machines()
"""This machine."""


def default_ranks(device: str) -> int:
    """One rank per visible GPU, one on a CPU."""
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class Torchrun:
    """The `Launcher` that needs nothing but torch: its elastic agent, on this machine and on others where the same
    command is run."""

    waits = True

    def ranks(self, request: LaunchRequest) -> int | None:
        several = request.ranks or request.machines.most > 1
        return self._here(request) * request.machines.most if several else None

    def starts(self, request: LaunchRequest) -> bool:
        if request.machines.most > 1 and not request.machines.endpoint:
            raise RecipeError(
                "--rdzv-endpoint: not given, several machines need HOST:PORT, the same on all of them and HOST being "
                "one of them, such as 10.0.0.1:29400"
            )
        return request.machines != _ALONE or bool(request.restarts) or self._here(request) > 1

    def describe(self, request: LaunchRequest) -> str:
        python, *rest = request.command
        if not self.starts(request):
            return shlex.join(request.command)
        machines = request.machines
        nodes = str(machines.most) if machines.least == machines.most else f"{machines.least}:{machines.most}"
        words = ["--nnodes", nodes, "--nproc-per-node", str(self._here(request))]
        words += ["--max-restarts", str(request.restarts)] if request.restarts else []
        if machines.endpoint:
            words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", machines.endpoint, "--rdzv-id", machines.run_id]
        return shlex.join([python, "-m", "torch.distributed.run", *words, *rest])

    def launch(self, request: LaunchRequest) -> int:
        self.starts(request)
        return start(request.command, self._here(request), request.machines, request.restarts or 0)

    def _here(self, request: LaunchRequest) -> int:
        return request.ranks or default_ranks(request.device)


def parse_machines(nnodes: str | None, endpoint: str | None, run_id: str | None) -> Machines:
    """The machines of a run from the command line. Raises RecipeError for what cannot be."""
    least, _, most = (nnodes or "1").partition(":")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise RecipeError(f'--nnodes: found "{nnodes}", allowed is a number of machines, or LEAST:MOST as in 2:4')
    host, _, port = (endpoint or "").rpartition(":")
    if endpoint and not (host and port.isdigit()):
        raise RecipeError(f'--rdzv-endpoint: found "{endpoint}", allowed is HOST:PORT, such as 10.0.0.1:29400')
    if run_id and not run_id.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise RecipeError(f'--rdzv-id: found "{run_id}", allowed are letters, digits, dots, "-" and "_"')
    made = Machines(least=int(least), most=int(most or least), endpoint=endpoint, given=nnodes is not None)
    return replace(made, run_id=run_id) if run_id else made


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m llmtune <arguments>` in `ranks` processes here and wait. Returns the first to fail's exit code."""
    return start([sys.executable, "-m", "llmtune", *arguments], ranks)


def start(command: Sequence[str], ranks: int, machines: Machines = _ALONE, restarts: int = 0) -> int:
    """Run `command` in `ranks` processes of this machine and wait. Returns the first to fail's exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    quiet_launcher()
    with process_as_it_was(), tempfile.TemporaryDirectory(prefix="llmtune-") as logs:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        if in_notebook():
            os.environ[FROM_NOTEBOOK] = "1"
        try:
            elastic_launch(_launch_config(ranks, machines, restarts, logs), command[0])(*command[1:])
        except ChildFailedError as failure:
            return _first_failure(failure)
        except SignalException as stop:
            # The launcher has passed the signal on and waited for the ranks, which have said what became of them.
            return 130 if isinstance(stop.__context__, SignalException) else EXIT_INTERRUPTED
        except RendezvousError as error:
            raise LaunchError(
                f"--rdzv-endpoint: the machines did not meet at {machines.endpoint} ({error}); start the same command "
                "on every machine, and look whether they reach that address"
            ) from error
    return 0


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Afterwards, this process has the environment and the handlers of signals that it had before: torch's launcher
    leaves its own, and a notebook or a program goes on with the next run."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != handler:
                    signal.signal(number, handler)


def quiet_launcher() -> None:
    """Keep torch's reports of signals and failed ranks out of the terminal, where the ranks speak for themselves.

    `LOGLEVEL`, which torch reads too, brings them back.
    """
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


def _launch_config(ranks: int, machines: Machines, restarts: int, logs: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    more: dict[str, Any] = {"rdzv_endpoint": "localhost:0", "run_id": f"llmtune-{os.getpid()}"}
    if machines.endpoint:
        host = machines.endpoint.rpartition(":")[0]
        here = own_address(host)
        # Names of machines often lead to 127.0.1.1 or nowhere; the address that reaches the meeting place is right.
        if interface := interface_of(here):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        more = {"rdzv_endpoint": machines.endpoint, "run_id": machines.run_id, "local_addr": here}
        more["rdzv_configs"] = {"is_host": here == socket.gethostbyname(host) or here.startswith("127.")}
    if machines.most > 1 or restarts:
        # A store of its own for every start: ranks that were started again would meet the addresses of dead ones.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return LaunchConfig(
        min_nodes=machines.least, max_nodes=machines.most, nproc_per_node=ranks, rdzv_backend="c10d",
        max_restarts=restarts, monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.NONE, tee=Std.NONE), **more,
    )  # fmt: skip


def rank_environment(
    rank: int, ranks: int, local_rank: int, local_ranks: int, address: str, port: int, launcher: str
) -> dict[str, str]:
    """The variables that make a process one of `ranks`, for launchers; called on the machine where it will run.

    Ranks meet at `address:port`, an address of rank 0's machine and a port that is free there. `launcher` is a name
    that this launch shares with no other; ranks that are started again have it, too, so that they continue.
    """
    known = {
        "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_ranks,
        "MASTER_ADDR": address, "MASTER_PORT": port, LAUNCHER: launcher,
    }  # fmt: skip
    found = {name: str(value) for name, value in known.items()}
    if (interface := interface_of(own_address(address))) and "GLOO_SOCKET_IFNAME" not in os.environ:
        found["GLOO_SOCKET_IFNAME"] = interface  # names of machines often lead to 127.0.1.1 or nowhere
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // local_ranks))
    return found


def own_address(host: str) -> str:
    """This machine's IPv4 address on the way to `host`. Raises LaunchError if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing; the system picks the route
        except OSError as error:
            raise LaunchError(f"--rdzv-endpoint: {host} cannot be reached from here ({error})") from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where the system does not say."""
    try:
        import fcntl
    except ImportError:
        return None
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24]) == address:
                    return name
    return None


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
    """The ranks of a run cannot be started; or one of them failed, and its own message is above."""

    exit_code = 2
