"""What a kernel says of itself, and the one way in which kernels change a module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import nn

from llmtune import ModelEdit, RunContext


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel: the operation it replaces, where it runs, and how it is put in."""

    id: str
    op: str
    """The operation. A recipe can replace each operation once."""
    summary: str
    models: str
    """For which models, in words."""
    devices: frozenset[str]
    suits: Callable[[nn.Module, RunContext], str | None]
    """Why this model cannot have it, as the end of "it does not suit this model: ...", or None. Called only where
    device and package are there."""
    apply: Callable[[nn.Module, RunContext], ModelEdit]
    """Put it in. `ModelEdit.report` holds one line that says where."""
    package: str | None = None
    """Module that must be installed."""
    extra: str | None = None
    """What to pip-install for it."""
    train_only: bool = False
    """It changes nothing in inference."""

    def obstacle(self, model: nn.Module, context: RunContext) -> tuple[str, str] | None:
        """(why it cannot run here, what to do), or None."""
        if context.device not in self.devices:
            needs = " or ".join(sorted(self.devices))
            return f"it runs on {needs}, and this run is on {context.device}", "remove it or run on another device"
        if self.package and find_spec(self.package) is None:
            return f"it needs {self.package}, which is not installed", f"run: pip install '{self.extra}'"
        if reason := self.suits(model, context):
            return f"it does not suit this model: {reason}", "remove it"
        return None


def swap_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Give this one module another `forward`. Parameters, names, children, hooks and `isinstance` stay."""
    module.__class__ = _subclass(getattr(type(module), "plain_class", type(module)), forward)


@functools.cache
def _subclass(cls: type[nn.Module], forward: Callable[..., object]) -> type[nn.Module]:
    return type(f"Fast{cls.__name__}", (cls,), {"forward": forward, "plain_class": cls})


def transformers_class(module: nn.Module) -> str:
    """Name of the module's class if transformers itself defines it, else empty: a class of the same name from
    elsewhere may compute something else."""
    cls = getattr(type(module), "plain_class", type(module))
    return cls.__name__ if cls.__module__.startswith("transformers.models.") else ""


def modules_of(model: nn.Module, classes: Mapping[str, object]) -> list[tuple[str, Any]]:
    """Modules whose exact class is listed, with their names."""
    return [(name, module) for name, module in model.named_modules() if transformers_class(module) in classes]


def where(found: list[tuple[str, nn.Module]]) -> str:
    """`61 modules, model.layers.0.input_layernorm to model.norm`."""
    if len(found) == 1:
        return f"1 module, {found[0][0]}"
    return f"{len(found)} modules, {found[0][0]} to {found[-1][0]}"
