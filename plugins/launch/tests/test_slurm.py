"""Slurm's script, run by a queue of this machine: `sbatch` runs it at once, `srun` runs each task in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.testing import tiny_recipe

COMMANDS = {
    "sbatch": 'grep "^#SBATCH" "$1" > submitted; SLURM_JOB_ID=7 SLURM_JOB_NODELIST=localhost bash "$1" > job.out 2>&1\n'
    'echo "Submitted batch job 7"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": "echo 127.0.0.1",
}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "bin"
    place.mkdir()
    for name, script in COMMANDS.items():
        (place / name).write_text(f"#!/bin/bash\n{script}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place


def write(folder: Path, **keys: Any) -> str:
    launcher = {"name": "slurm", **keys}
    recipe = tiny_recipe(folder, max_steps=2, launch_config=launcher, output_dir="run")
    (folder / "tiny.json").write_text(json.dumps(recipe))
    return "tiny.json"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmtune", "train", *words], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_job_is_queued_and_trains(queue: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, partition="gpu", options=["--mem=8G"], setup=["export LLMTUNE_SAID=yes"])
    done = run(tmp_path, recipe)
    assert done.returncode == 0, done.stderr
    assert "Submitted batch job 7: run.sbatch, which writes to run-%j.out" in done.stdout
    assert {"#SBATCH --job-name=tiny", "#SBATCH --nodes=1", "#SBATCH --mem=8G", "#SBATCH --signal=TERM@120"} <= set(
        (tmp_path / "submitted").read_text().splitlines()
    )
    assert llmtune.load(tmp_path / "run").status == "done", (tmp_path / "job.out").read_text()


def test_a_dry_run_prints_the_script_of_several_machines(tmp_path: Path) -> None:
    recipe = write(tmp_path, nodes=4, ranks_per_node=8, time="12:00:00", account="me", signal_s=0)
    done = run(tmp_path, recipe, "--dry-run", "--nnodes", "2", "--rdzv-endpoint", "x:1", "token=hf_mine", "device=auto")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert lines[0] == "# run.sbatch, for sbatch:" and not (tmp_path / "run.sbatch").exists()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --time=12:00:00", "#SBATCH --account=me"} <= {
        *lines
    }
    assert 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in lines
    said = " ".join(lines[-1].split())
    assert (
        said.startswith("srun --kill-on-bad-exit=1 ") and "hf_mine" not in done.stdout and "signal" not in done.stdout
    )
    assert said.endswith(
        'launch_config=torchrun --nproc 8 --nnodes 2 --rdzv-endpoint "$head:29400" --rdzv-id "$SLURM_JOB_ID"'
    )


def test_the_command_line_says_how_many_machines(tmp_path: Path) -> None:
    recipe = write(tmp_path, nodes=2, cpus_per_task=6, gpus_per_node=4)
    lines = run(tmp_path, recipe, "--dry-run", "--nnodes", "1").stdout.rstrip().splitlines()
    assert "#SBATCH --nodes=1" in lines and "#SBATCH --cpus-per-task=6" in lines
    assert lines[-1].startswith("srun --kill-on-bad-exit=1 --cpus-per-task=6 ") and "--nnodes" not in lines[-1]
    assert " --nproc 4" in lines[-1]  # a rank for each GPU
    assert "--nnodes: found 2:4, allowed is one number" in run(tmp_path, recipe, "--dry-run", "--nnodes", "2:4").stderr


def test_what_cannot_be_queued(queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path)
    assert "a secret would be written into the job's script" in run(tmp_path, recipe, "token=hf_mine").stderr
    with pytest.raises(llmtune.PlanError, match="slurm hands a run over to run later"):
        llmtune.train(tmp_path / recipe)
    (queue / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    monkeypatch.chdir(tmp_path)
    refused = run(tmp_path, recipe)
    assert "sbatch refused run.sbatch: invalid partition" in refused.stderr and refused.returncode == 2
    (queue / "sbatch").unlink()
    alone = run(tmp_path, recipe)
    assert "needs the command sbatch, which is not on the PATH here" in alone.stderr and alone.returncode == 2
