"""A run as a job of Slurm: `srun` starts torch's launcher once on each machine, the machines meet on the first."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from llmtune import LaunchError, LaunchRequest

from . import SlurmConfig


class Slurm:
    """A `Launcher` that writes a batch script and hands it to `sbatch`."""

    waits = False

    def __init__(self, config: SlurmConfig) -> None:
        self.config = config

    def ranks(self, request: LaunchRequest) -> int:
        return self._nodes(request) * self._ranks_per_node(request)

    def starts(self, request: LaunchRequest) -> bool:
        return True

    def describe(self, request: LaunchRequest) -> str:
        return f"# {self._script(request)}, for sbatch:\n{self.script(request)}"

    def launch(self, request: LaunchRequest) -> int:
        sbatch = shutil.which("sbatch")
        if sbatch is None:
            raise LaunchError(
                "launch_config: slurm needs the command sbatch, which is not on the PATH here; run this on a machine "
                "of the cluster, or print the script with --dry-run"
            )
        path = self._script(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.script(request), encoding="utf-8")
        done = subprocess.run([sbatch, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise LaunchError(f"launch_config: sbatch refused {path}: {said}; correct the block and run again")
        print(f"{done.stdout.strip()}: {path}, which writes to {self._output(request)}")
        return 0

    def script(self, request: LaunchRequest) -> str:
        """The batch script."""
        given, nodes = self.config, self._nodes(request)
        gpus = given.gpus_per_node
        if gpus is None:
            gpus = 0 if request.device == "cpu" else self._ranks_per_node(request)
        options = {
            "job-name": given.job_name or request.name, "nodes": nodes, "ntasks-per-node": 1,
            "gpus-per-node": gpus or None, "cpus-per-task": given.cpus_per_task, "time": given.time,
            "partition": given.partition, "account": given.account, "chdir": os.getcwd(),
            "output": self._output(request), "signal": f"TERM@{given.signal_s}" if given.signal_s else None,
        }  # fmt: skip
        lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
        restarts = given.max_restarts if request.restarts is None else request.restarts
        words = [*request.command, "launch_config=torchrun", "--nproc", str(self._ranks_per_node(request))]
        words += ["--max-restarts", str(restarts)] if restarts else []
        meeting = []
        command = shlex.join(words)
        if nodes > 1:
            meeting = ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
            command += f' --nnodes {nodes} --rdzv-endpoint "$head:{given.port}" --rdzv-id "$SLURM_JOB_ID"'
        # Slurm does not hand a job's cores for a task on to `srun` (since its version 22.05).
        cores = [f"--cpus-per-task={given.cpus_per_task}"] if given.cpus_per_task else []
        srun = shlex.join(["srun", "--kill-on-bad-exit=1", *cores, *given.srun])
        return "\n".join(
            [
                "#!/bin/bash", *(f"#SBATCH {line}" for line in [*lines, *given.options]), "",
                *given.setup, *meeting, f"{srun} {command}", "",
            ]
        )  # fmt: skip

    def _nodes(self, request: LaunchRequest) -> int:
        machines = request.machines
        if machines.least != machines.most:
            raise LaunchError(
                f"--nnodes: found {machines.least}:{machines.most}, allowed is one number, as Slurm gives a job all of "
                "its machines at once"
            )
        return machines.most if machines.given else self.config.nodes

    def _ranks_per_node(self, request: LaunchRequest) -> int:
        return request.ranks or self.config.ranks_per_node or self.config.gpus_per_node or 1

    def _script(self, request: LaunchRequest) -> Path:
        return request.output_dir.with_name(f"{request.output_dir.name}.sbatch")

    def _output(self, request: LaunchRequest) -> str:
        return self.config.output or f"{request.output_dir}-%j.out"
