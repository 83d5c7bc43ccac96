"""The keys of each tracker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where and under which name Weights & Biases shows the run."""

    project: str | None = None
    """Project of the run; null means the environment's `WANDB_PROJECT`, else `llmtune`."""
    entity: str | None = None
    """User or team; null means your default one."""
    run_name: str | None = None
    """Name of the run; null is the name of the run's folder."""
    group: str | None = None
    """Group of runs that this one belongs to."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` keeps all in the run's folder for `wandb sync`; null means the environment's `WANDB_MODE`, else
    `online`."""
    api_key: str | None = None
    """Key of your account, written nowhere; null means `WANDB_API_KEY` or what `wandb login` has stored."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """Which MLflow server or database gets the run."""

    tracking_uri: str | None = None
    """Address of the server (`http://127.0.0.1:5000`) or a database (`sqlite:///runs.db`); null means the environment's
    `MLFLOW_TRACKING_URI`, else MLflow's own default in the folder where the run is started. Passwords and tokens come
    from `MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD` and `MLFLOW_TRACKING_TOKEN`."""
    experiment: str | None = None
    """Experiment of the run, made where there is none; null means `MLFLOW_EXPERIMENT_NAME`, else `llmtune`."""
    run_name: str | None = None
    """Name of the run; null is the name of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class SwanLabConfig:
    """Where and under which name SwanLab shows the run."""

    swanlab_project: str = "llmtune"
    """Project of the run."""
    swanlab_workspace: str | None = None
    """Workspace; null means your own."""
    swanlab_run_name: str | None = None
    """Name of the run; null is the name of the run's folder."""
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] = "cloud"
    """`local` writes files for SwanLab's local dashboard, `offline` files for `swanlab sync`."""
    swanlab_api_key: str | None = None
    """Key of your account, written nowhere; null means `SWANLAB_API_KEY` or what `swanlab login` has stored."""
    swanlab_logdir: str | None = None
    """Folder of its files; null means `loggers/swanlab` in the run's folder. `~` is your home."""
    swanlab_lark_webhook_url: str | None = None
    """Address of a Lark (Feishu) bot that is told when the run ends; written nowhere."""
    swanlab_lark_secret: str | None = None
    """Secret of that bot, if it asks for one; written nowhere."""


@dataclass(frozen=True, kw_only=True)
class TrackioConfig:
    """Where and under which name trackio shows the run."""

    project: str = "llmtune"
    """Project of the run."""
    run_name: str | None = None
    """Name of the run; null is the name of the run's folder and a few letters, as trackio knows runs by name."""
    group: str | None = None
    """Group of runs that this one belongs to."""
    space_id: str | None = None
    """Hugging Face Space (`me/space`) that shows the run; null keeps it in the database of this machine."""
