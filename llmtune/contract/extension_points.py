"""The extension points of a recipe, one record for each. Whatever llmtune lists of them follows from these records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmtune.contract.environment import named_plugins
from llmtune.contract.errors import listed
from llmtune.contract.evaluation import Evaluator, MeasuresAnswers, MeasuresBatches, MeasuresModel
from llmtune.contract.examples import KINDS, DataFormat
from llmtune.contract.generation import Engine
from llmtune.contract.hubs import Hub
from llmtune.contract.launching import Launcher
from llmtune.contract.loggers import Logger
from llmtune.contract.optimizers import OptimizerFactory
from llmtune.contract.records import (
    Adapter,
    Distribute,
    Edit,
    Init,
    Kernel,
    Peft,
    Quant,
    Schedule,
)
from llmtune.contract.rewards import Reward
from llmtune.contract.shipped import shipped
from llmtune.contract.stages import Stage


@dataclass(frozen=True, kw_only=True)
class ExtensionPoint:
    """A key of the recipe that names plugins, and the hook of the same name."""

    name: str
    """The key of the recipe, which ends in `_config`."""
    question: str
    """The sentence that says what a plugin of this point decides."""
    protocol: type
    """The protocol that the object keeps to which a plugin's `build` returns."""
    several: bool = False
    """Whether a recipe may name several plugins, as a list."""
    repeats: bool = False
    """Whether that list may name one of them more than once."""
    required: bool = False
    """Whether no recipe can do without; null then means the default, and elsewhere it means none."""
    shapes_model: bool = False
    """Whether the model's structure, weights or loss depend on the plugin, so that using a model needs it."""
    changes_training: bool = True
    """Whether other weights come out with another plugin, so that a run cannot continue with one."""

    @property
    def edits(self) -> bool:
        """Whether its plugins edit the model's structure."""
        return Edit in self.protocol.__mro__

    @property
    def default(self) -> str | None:
        """The plugin of a recipe that leaves the key out; None where it then has none."""
        return default_plugins().get(self.name)

    def objection(self, built: Any) -> str | None:
        """What a built object does not keep of the protocol, as the end of a sentence; None where it keeps it."""
        missing = lacking(self.protocol, built)
        if missing == ["start"] and hasattr(built, "begin"):  # loggers have one of the two
            missing = []
        if missing:
            return f"lacks {listed(missing)}, which {self.protocol.__name__} asks for"
        for name in (name for name, kind in members(self.protocol).items() if kind == "bool"):
            if not isinstance(found := getattr(built, name), bool):
                return f"has {found!r} as {name}, allowed is True or False"
        kinds = {"peft_config": ("adapter", "weights"), "data_config": KINDS}.get(self.name)
        if kinds and built.kind not in kinds:
            return f"has the kind {built.kind!r}, allowed is one of {listed(kinds)}"
        if self.name == "peft_config" and built.kind == "adapter" and (missing := lacking(Adapter, built)):
            return f"is an adapter and lacks {listed(missing)}; write it, or set kind to weights"
        if self.name == "eval_config" and not isinstance(built, MeasuresBatches | MeasuresAnswers | MeasuresModel):
            return (
                "measures nothing; write `measure_batch`, `measure_answers` with `generation` and `needs_labels`, or "
                "`measure_model` with `settings`"
            )
        return None


def members(protocol: type) -> dict[str, Any]:
    """The attributes of a protocol with their annotations, and its methods."""
    found: dict[str, Any] = {}
    for kind in reversed(protocol.__mro__):
        found |= vars(kind).get("__annotations__", {}) | vars(kind)
    return {name: member for name, member in found.items() if not name.startswith("_")}


def lacking(protocol: type, built: Any) -> list[str]:
    """The attributes and methods of a protocol that an object does not have. Inherited stubs do not count."""
    return sorted(
        name
        for name, member in members(protocol).items()
        if not hasattr(built, name) or (callable(member) and getattr(type(built), name, None) is member)
    )


POINTS: Mapping[str, ExtensionPoint] = {
    point.name: point
    for point in (
        ExtensionPoint(
            name="hub_config",
            question="Where models, adapters and data sets come from.",
            protocol=Hub,
            required=True,
            shapes_model=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="init_config",
            question="How weights arrive on the ranks.",
            protocol=Init,
            required=True,
            shapes_model=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="quant_config",
            question="How frozen base weights are stored.",
            protocol=Quant,
            shapes_model=True,
        ),
        ExtensionPoint(
            name="peft_config",
            question="Which parameters train.",
            protocol=Peft,
            shapes_model=True,
        ),
        ExtensionPoint(
            name="kernel_config",
            question="Which operations are replaced by faster ones.",
            protocol=Kernel,
            several=True,
            shapes_model=True,
        ),
        ExtensionPoint(
            name="stage_config",
            question="What is learnt from what data.",
            protocol=Stage,
            required=True,
            shapes_model=True,
        ),
        ExtensionPoint(
            name="reward_config",
            question="What an answer is worth, for stages that learn from answers of the model.",
            protocol=Reward,
            several=True,
            repeats=True,
        ),
        ExtensionPoint(
            name="data_config",
            question="What the rows of data sets look like.",
            protocol=DataFormat,
            required=True,
        ),
        ExtensionPoint(
            name="dist_config",
            question="How the model is spread over ranks.",
            protocol=Distribute,
            required=True,
            shapes_model=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="launch_config",
            question="Who starts the processes.",
            protocol=Launcher,
            required=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="optim_config",
            question="The optimiser.",
            protocol=OptimizerFactory,
            required=True,
        ),
        ExtensionPoint(
            name="lr_scheduler_config",
            question="The learning rate after warm-up.",
            protocol=Schedule,
            required=True,
        ),
        ExtensionPoint(
            name="logger_config",
            question="Where metrics go besides `metrics.jsonl`.",
            protocol=Logger,
            several=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="eval_config",
            question="What is measured besides the loss.",
            protocol=Evaluator,
            several=True,
            changes_training=False,
        ),
        ExtensionPoint(
            name="engine_config",
            question="What generates answers.",
            protocol=Engine,
            required=True,
            changes_training=False,
        ),
    )
}
"""In the order in which a recipe is read and a model is built."""
EXTENSION_POINTS = tuple(POINTS)
"""The names of the extension points."""


def default_plugins() -> Mapping[str, str]:
    """The plugins of the extension points that a recipe leaves out: as the environment names them, else as
    `defaults.yaml` does."""
    return {**_shipped_defaults(), **{point: plugin for point, (plugin, _) in named_plugins().items()}}


@cache
def _shipped_defaults() -> Mapping[str, str]:
    return shipped("llmtune.contract", "defaults.yaml")
