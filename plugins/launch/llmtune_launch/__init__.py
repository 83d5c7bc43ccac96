"""Launchers: `launch_config: ray` for a Ray cluster, `launch_config: slurm` for a queue of jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmtune import Ge, Plugin, hookimpl


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Keys of `launch_config: {name: ray}`."""

    ray_num_workers: Annotated[int, Ge(1)] = 1
    """Workers, each of which is one rank; `--nproc` wins over it."""
    resources_per_worker: dict[str, float] | str | None = None
    """What each worker takes of the cluster, as `{GPU: 1}` or its JSON; null is one GPU, or one CPU where the recipe
    says `device: cpu` or the cluster has no GPU."""
    placement_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "PACK"
    """How workers are laid over machines: together as far as possible (`PACK`) or in any case (`STRICT_PACK`), or apart
    likewise (`SPREAD`, `STRICT_SPREAD`)."""
    ray_run_name: str | None = None
    """Name of the run's placement group and of its folder of logs; null is the recipe's."""
    ray_storage_path: str | None = None
    """Folder for what each worker prints, one file for each start of a rank in `ray_storage_path/ray_run_name`; null
    keeps no copy. The run itself is in `output_dir`, which the machines have to share."""
    max_restarts: Annotated[int, Ge(0)] = 3
    """How often all workers are started again, from the last checkpoint, after one has died; `--max-restarts` wins."""
    ray_init_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ray.init`, such as `{address: auto}`. Without an address, here or in RAY_ADDRESS, a cluster is
    started on this machine and ended with the run."""
    wait_s: Annotated[float, Ge(0)] = 600.0
    """Seconds to wait for the cluster to have what the workers take."""

    def __post_init__(self) -> None:
        gpus = self.resources.get("GPU", 0)
        if gpus not in (0, 1):
            raise ValueError(f"resources_per_worker: found {gpus:g} GPU, allowed is 0 or 1, as a worker is one rank")

    @property
    def resources(self) -> Mapping[str, float]:
        """`resources_per_worker` as a mapping; empty where it is left open."""
        given = self.resources_per_worker or {}
        try:
            found = json.loads(given) if isinstance(given, str) else given
            return {str(name): float(amount) for name, amount in found.items()}
        except (ValueError, AttributeError, TypeError):
            raise ValueError(
                f'resources_per_worker: found "{given}", allowed is a mapping such as {{GPU: 1}}, or its JSON'
            ) from None


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Keys of `launch_config: {name: slurm}`."""

    nodes: Annotated[int, Ge(1)] = 1
    """Machines of the job; `--nnodes` wins over it."""
    ranks_per_node: Annotated[int, Ge(1)] | None = None
    """Ranks on each machine; null is one for each of `gpus_per_node`, else one. `--nproc` wins over it."""
    gpus_per_node: Annotated[int, Ge(0)] | None = None
    """GPUs to ask for on each machine; null is one for each rank, and none where the recipe says `device: cpu`."""
    cpus_per_task: Annotated[int, Ge(1)] | None = None
    """CPU cores on each machine; null leaves it to the cluster."""
    time: str | None = None
    """Time limit, as `sbatch --time` takes it (`12:00:00`); null is the partition's."""
    partition: str | None = None
    """Partition to queue in; null is the cluster's default."""
    account: str | None = None
    """Account to charge; null is the user's default."""
    job_name: str | None = None
    """Name of the job; null is the recipe's."""
    output: str | None = None
    """File for what the job prints, as `sbatch --output` takes it; null is `OUTPUT_DIR-%j.out`."""
    signal_s: Annotated[int, Ge(0)] = 120
    """Seconds before the time limit at which the run is asked to save and end; 0 does not ask."""
    port: Annotated[int, Ge(1)] = 29400
    """Port of the first machine where several meet."""
    max_restarts: Annotated[int, Ge(0)] = 0
    """How often ranks are started again within the job after one has died; `--max-restarts` wins."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, one a line of the script, such as `--mem=200G`."""
    setup: tuple[str, ...] = ()
    """Lines of shell to run first on each machine's behalf, such as `module load cuda`."""
    srun: tuple[str, ...] = ()
    """Further options of srun, such as `--container-image=...`."""

    def __post_init__(self) -> None:
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise ValueError(
                f'time: found "{self.time}", allowed is what sbatch takes: minutes, or "12:00:00", or "2-12:00:00"'
            )


def _ray(config: RayConfig) -> Any:
    from .cluster import Ray

    return Ray(config)


def _slurm(config: SlurmConfig) -> Any:
    from .slurm import Slurm

    return Slurm(config)


@hookimpl
def launch_config() -> list[Plugin]:
    """`ray` and `slurm`."""
    return [
        Plugin(
            name="ray", config=RayConfig, build=_ray, requires=("ray>=2.40",),
            summary="Workers of a Ray cluster, started again from the last checkpoint where one dies",
        ),
        Plugin(
            name="slurm", config=SlurmConfig, build=_slurm,
            summary="A batch script that is written beside the run's folder and handed to sbatch",
        ),
    ]  # fmt: skip
