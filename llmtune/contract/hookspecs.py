"""The hooks. A recipe key that ends in `_config` is an extension point and has one hook of the same name.

Hooks return records; they do not act. The one exception watches and can change nothing: `observe`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from llmtune.contract.records import Event, Plugin

hookspec = pluggy.HookspecMarker("llmtune")
hookimpl = pluggy.HookimplMarker("llmtune")


@hookspec
def init_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """How weights arrive on the ranks. `build` returns an `Init`."""


@hookspec
def quant_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """How frozen base weights are stored. `build` returns a `Quant`."""


@hookspec
def peft_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """Which parameters train. `build` returns a `Peft`."""


@hookspec
def kernel_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """Which operations are replaced by faster ones. `build` returns a `Kernel`."""


@hookspec
def stage_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """What is learnt from what data. `build` returns a `Stage`."""


@hookspec
def data_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """What the rows of data sets look like. `build` returns a `DataFormat`."""


@hookspec
def dist_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """How the model is spread over ranks. `build` returns a `Distribute`."""


@hookspec
def optim_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """The optimiser. `build` returns an `OptimizerFactory`."""


@hookspec
def lr_scheduler_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """The learning rate after warm-up. `build` returns a `Schedule`."""


@hookspec
def logger_config() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """Where metrics go besides `metrics.jsonl`. `build` returns a `Logger`."""


@hookspec
def observe(event: Event) -> None:
    """Watch a run: called on rank 0 after logged steps, evaluations and checkpoints."""


EXTENSION_POINTS = (
    "init_config",
    "quant_config",
    "peft_config",
    "kernel_config",
    "stage_config",
    "data_config",
    "dist_config",
    "optim_config",
    "lr_scheduler_config",
    "logger_config",
)
"""In the order in which a recipe is read and a model is built."""
