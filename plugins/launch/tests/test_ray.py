"""A real cluster of Ray on this machine: a worker that dies costs nothing but time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from llmtune_launch import RayConfig

import llmtune
from llmtune.testing import Law, in_ranks, laws, read_keys, tiny_recipe

ray = pytest.importorskip("ray")
LIMIT_S = 240
STEPS = 24


def keys(folder: Path, **changes: Any) -> dict[str, Any]:
    adapter = {"name": "lora", "lora_dropout": 0.1}  # random numbers of each step, too
    given = {"max_steps": STEPS, "save_steps": 4, "peft_config": adapter, "gradient_accumulation_steps": 1, **changes}
    return tiny_recipe(folder, **given)


def numbers(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in llmtune.load(run).metrics if "loss" in row]


def trained(recipe: dict[str, Any]) -> None:
    llmtune.train(recipe)


def process_of(rank: int, mark: str) -> int | None:
    """The process that runs a rank and has `mark` in its environment."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            known = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"RANK={rank}".encode(), f"LLMTUNE_PROBE={mark}".encode()} <= set(known):
            return int(place.name)
    return None


def test_more_than_the_cluster_has_is_refused_at_once(tmp_path: Path) -> None:
    launcher = {
        "name": "ray",
        "resources_per_worker": '{"tpu": 2}',
        "ray_init_kwargs": {"num_cpus": 1, "include_dashboard": False},
    }
    with pytest.raises(llmtune.LaunchError, match=r"1 workers of Ray take tpu 2 each .*the cluster has tpu 0 in all"):
        llmtune.train(keys(tmp_path, launch_config=launcher))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for most tests, as starting one takes seconds."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.parametrize("law", laws("launch_config", "ray", {"resources_per_worker": {"CPU": 0.5}}), ids=str)
def test_contract(law: Law, tmp_path: Path, cluster: None) -> None:
    law(tmp_path)


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Once there is a checkpoint, kill the process of Ray that has started rank 1."""
    deadline = time.monotonic() + LIMIT_S
    rank = None
    while rank is None and time.monotonic() < deadline:
        time.sleep(0.05)
        rank = process_of(1, str(folder))
    while not list(folder.glob("run/checkpoints/step-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.append(int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]))
    os.kill(killed[0], signal.SIGKILL)


def test_a_worker_that_dies_is_started_again_and_the_numbers_are_the_same(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTUNE_PROBE", str(tmp_path))
    launcher = {"name": "ray", "ray_num_workers": 2, "ray_storage_path": str(tmp_path / "logs"), "ray_run_name": "two"}
    killed: list[int] = []
    threading.Thread(target=kill_a_worker, args=(tmp_path, killed), daemon=True).start()
    run = llmtune.train(keys(tmp_path, launch_config=launcher), fresh=True)
    said = "".join(capsys.readouterr())
    assert killed and "a worker died; starting all 2 again" in said and "Continuing after step" in said
    assert len(list((tmp_path / "logs" / "two").glob("start-[01]-rank-[01].log"))) == 4
    in_ranks(2, tmp_path / "ranks", trained, keys(tmp_path, output_dir=str(tmp_path / "straight")))
    assert numbers(run.output_dir) == numbers(tmp_path / "straight") and len(numbers(run.output_dir)) == STEPS


def test_the_plan_is_for_its_workers_and_shows_it(tmp_path: Path) -> None:
    said = str(llmtune.plan(keys(tmp_path, launch_config={"name": "ray", "ray_num_workers": 3})))
    assert "3 ranks" in said and "launch        ray (llmtune-launch" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resources_per_worker": {"GPU": 2}}, "found 2 GPU, allowed is 0 or 1"),
        ({"resources_per_worker": "two"}, 'found "two", allowed is a mapping'),
        ({"placement_strategy": "NEAR"}, "PACK"),
    ],
)
def test_what_a_worker_cannot_take(given: dict[str, Any], words: str) -> None:
    assert words in read_keys(RayConfig, given)[1][0]


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = sys.modules["llmtune.recipe.packages"].version

    def version(name: str) -> str:
        if name == "ray":
            raise PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr("llmtune.recipe.packages.version", version)
    with pytest.raises(llmtune.PluginError, match=r'"ray" of llmtune-launch .* needs ray.*; run: pip install "ray'):
        llmtune.plan(keys(tmp_path, launch_config="ray"))
