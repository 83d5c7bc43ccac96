"""Two machines, each a network namespace with an address of its own: as one machine, and when one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmtune
from tests.runs import recipe

ADDRESS = {"one": "10.199.77.1", "two": "10.199.77.2"}
LIMIT_S = 300


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machines:
    """The two namespaces, and what was started in them."""

    def __init__(self, mark: str) -> None:
        self.names = {"one": f"lt{mark}a", "two": f"lt{mark}b"}
        self.started: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        one, two = self.names.values()
        for name in (one, two):
            _ip("netns", "add", name)
        _ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", two, "netns", two)
        for key, name in self.names.items():
            _ip("-n", name, "addr", "add", f"{ADDRESS[key]}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def start(self, machine: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[machine], *command],
                stdout=out, stderr=out, env=environment, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The launcher and its ranks, at once, as when a machine loses power."""
        ranks = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        for number in [process.pid, *map(int, ranks)]:
            os.kill(number, signal.SIGKILL)
        process.wait()

    def remove(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.kill(process)
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip to make network namespaces")
    made = Machines(str(os.getpid()))
    try:
        made.connect()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def place(tiny_llama: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and its run on two ranks of one machine in `straight`."""
    root = tmp_path_factory.mktemp("machines")
    keys = recipe(tiny_llama, chats, root / "run", gradient_accumulation_steps=1, max_steps=60, save_steps=5)
    (root / "recipe.json").write_text(json.dumps(keys))
    llmtune.train(root / "recipe.json", nproc=2, output_dir=str(root / "straight"))
    return root


def train_command(place: Path, output: str, *options: str, **changes: Any) -> list[str]:
    words = [f"{key}={value}" for key, value in {"output_dir": place / output, **changes}.items()]
    meet = ["--nproc", "1", "--rdzv-endpoint", f"{ADDRESS['one']}:29400", "--rdzv-id", output.replace("/", "-")]
    return [sys.executable, "-m", "llmtune", "train", str(place / "recipe.json"), *words, *meet, *options]


def wait_for(path: Path, logs: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), logs.read_text()
        time.sleep(0.02)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in llmtune.load(run).metrics]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    expected, found = (load_file(run / "trained.safetensors") for run in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def finish(processes: list[subprocess.Popen[bytes]], log: Path) -> list[int]:
    codes = [process.wait(LIMIT_S) for process in processes]
    print(log.read_text())
    return codes


@pytest.mark.slow
def test_two_machines_learn_what_one_does(machines: Machines, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = train_command(place, "two", "--nnodes", "2")
    started = [machines.start(machine, command, log) for machine in ADDRESS]
    assert finish(started, log) == [0, 0]
    assert_same_run(place / "straight", place / "two")


@pytest.mark.slow
def test_torchrun_starts_machines_too(machines: Machines, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.199.77.1:29401"]
    started = []
    for machine, name in machines.names.items():
        own = ["--local-addr", ADDRESS[machine], "--rdzv-conf", f"is_host={str(machine == 'one').lower()}"]
        train = ["-m", "llmtune", "train", str(place / "recipe.json"), f"output_dir={place}/torchrun"]
        command = ["env", f"GLOO_SOCKET_IFNAME={name}", sys.executable, "-m", "torch.distributed.run", *words, *own]
        started.append(machines.start(machine, [*command, *train], log))
    assert finish(started, log) == [0, 0]
    assert_same_run(place / "straight", place / "torchrun")


@pytest.mark.slow
def test_a_machine_that_dies_and_returns(machines: Machines, place: Path, tmp_path: Path) -> None:
    """Also with overwrite_output_dir: it was meant for the first start."""
    log = tmp_path / "log"
    (place / "elastic").mkdir()
    shutil.copy(place / "straight" / "run.json", place / "elastic" / "run.json")
    command = train_command(place, "elastic", "--nnodes", "2", "--max-restarts", "3", overwrite_output_dir="true")
    one, two = (machines.start(machine, command, log) for machine in ADDRESS)
    wait_for(place / "elastic" / "checkpoints" / "step-00000010", log, [one, two])
    machines.kill(two)
    two = machines.start("two", command, log)
    assert finish([one, two], log) == [0, 0]
    assert "Continuing after step" in log.read_text()
    assert_same_run(place / "straight", place / "elastic")


@pytest.mark.slow
def test_the_machine_that_is_left_goes_on_with_the_same_rows(machines: Machines, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    no_dropout = {"peft_config.lora_dropout": 0.0}
    command = train_command(place, "shrunk", "--nnodes", "1:2", "--max-restarts", "3", **no_dropout)
    one, two = (machines.start(machine, command, log) for machine in ADDRESS)
    wait_for(place / "shrunk" / "checkpoints" / "step-00000010", log, [one, two])
    machines.kill(two)
    assert finish([one], log) == [0]
    assert "accumulation_steps: 1 -> 2 on 1 rank, so that a step still has the run's 8 rows" in log.read_text()
    llmtune.train(place / "recipe.json", output_dir=str(place / "alone"), gradient_accumulation_steps=2, **no_dropout)
    for (step, expected), (same, found) in zip(losses(place / "alone"), losses(place / "shrunk"), strict=True):
        assert step == same and abs(found - expected) < 2e-3


@pytest.mark.slow
def test_a_folder_that_only_one_machine_has(machines: Machines, place: Path, tmp_path: Path) -> None:
    """`ip netns exec` gives its command a view of the file system of its own, so a mount in there is one machine's."""
    log, where = tmp_path / "log", place / "disk"
    where.mkdir()
    command = train_command(place, "disk/run", "--nnodes", "2")
    apart = ["sh", "-c", f'mount -t tmpfs none {where} && exec "$@"', "sh", *command]
    started = [machines.start("one", command, log), machines.start("two", apart, log)]
    assert finish(started, log) == [2, 2]
    assert "is not the folder that rank 0 on" in log.read_text() and "Loading weights" not in log.read_text()
