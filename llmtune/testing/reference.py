"""The plainest part for each extension point, named `reference`: what the laws put around the plugin under test. The
stage that learns from the model's own answers is `reference_answers`.

They are known to `llmtune.testing` alone; no recipe outside of it can name them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune import __version__
from llmtune.contract.hookspecs import hookimpl
from llmtune.contract.records import Plugin
from llmtune.recipe.packages import PackageSource

REFERENCE = PackageSource(
    module=__name__, distribution="llmtune.testing", version=__version__, names=("reference", "reference_answers")
)
"""Where the registry of the laws finds them."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Reference parts have no keys."""


def _plugin(kind: str, summary: str, name: str = "reference") -> list[Plugin]:
    return [Plugin(name=name, config=ReferenceConfig, build=_builder(kind), summary=summary)]


def _builder(kind: str) -> Callable[[Any], Any]:
    def build(config: Any) -> Any:
        from llmtune.testing import reference_parts

        return getattr(reference_parts, kind)()

    return build


@hookimpl
def init_config() -> list[Plugin]:
    """Every rank reads whole tensors."""
    return _plugin("ReadAll", "Whole tensors from the files")


@hookimpl
def peft_config() -> list[Plugin]:
    """A part that trains little, of any model, on any base."""
    return _plugin("Vectors", "Norms and biases train")


@hookimpl
def stage_config() -> list[Plugin]:
    """Next-token loss, and one of answers that the model gives."""
    answers = _plugin("ReferenceAnswers", "Answers with a high reward become more likely", "reference_answers")
    return [*_plugin("ReferenceLoss", "Summed next-token loss"), *answers]


@hookimpl
def reward_config() -> list[Plugin]:
    """A number that follows from the answer's tokens alone."""
    return _plugin("Evens", "Share of even tokens")


@hookimpl
def optim_config() -> list[Plugin]:
    """An optimiser linear in the gradient, so that rounding is not blown up."""
    return _plugin("Momentum", "SGD with momentum 0.9")


@hookimpl
def lr_scheduler_config() -> list[Plugin]:
    """The learning rate as it is."""
    return _plugin("Flat", "Always 1")
