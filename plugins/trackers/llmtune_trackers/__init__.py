"""Trackers of experiments, `logger_config`: wandb, mlflow, swanlab, trackio."""

from __future__ import annotations

from typing import Any

from llmtune import Plugin, hookimpl

from .configs import MlflowConfig, SwanLabConfig, TrackioConfig, WandbConfig


def build_wandb(config: WandbConfig) -> Any:
    """A `Logger`; imports wandb when a run begins."""
    from .wandb_run import WandbRun

    return WandbRun(config)


def build_mlflow(config: MlflowConfig) -> Any:
    """A `Logger`; imports mlflow when a run begins."""
    from .mlflow_run import MlflowRun

    return MlflowRun(config)


def build_swanlab(config: SwanLabConfig) -> Any:
    """A `Logger`; imports swanlab when a run begins."""
    from .swanlab_run import SwanLabRun

    return SwanLabRun(config)


def build_trackio(config: TrackioConfig) -> Any:
    """A `Logger`; imports trackio when a run begins."""
    from .trackio_run import TrackioRun

    return TrackioRun(config)


@hookimpl
def logger_config() -> list[Plugin]:
    """All of them."""
    return [
        Plugin(
            name="wandb",
            config=WandbConfig,
            build=build_wandb,
            summary="A run of Weights & Biases, online or offline",
            requires=("wandb>=0.19",),
        ),
        Plugin(
            name="mlflow",
            config=MlflowConfig,
            build=build_mlflow,
            summary="A run of an MLflow server or database",
            requires=("mlflow-skinny>=3",),
        ),
        Plugin(
            name="swanlab",
            config=SwanLabConfig,
            build=build_swanlab,
            summary="An experiment of SwanLab, in its cloud or in local files",
            requires=("swanlab>=0.8",),
        ),
        Plugin(
            name="trackio",
            config=TrackioConfig,
            build=build_trackio,
            summary="A run of trackio, in a local database or a Space",
            requires=("trackio>=0.20",),
        ),
    ]
