"""A text decoder with more layers than the files of its model have: which of their tensors each one starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.contract.errors import PlanError
from llmtune.contract.structure import text_layers
from llmtune.model.edits import persistent_names

if TYPE_CHECKING:
    from torch import nn


def layer_sources(model: nn.Module, layers: Sequence[int] | None) -> dict[str, str]:
    """The name in the files' own model of each tensor of `model` in a layer whose number there is another one.

    Raises PlanError where the model does not have as many layers as `layers` names.
    """
    if layers is None:
        return {}
    found = [name for name, _ in text_layers(model)]
    if len(found) != len(layers):
        raise PlanError(
            f"peft_config: an amended config says {len(layers)} layers, and {type(model).__name__} has {len(found)}"
        )
    stack = found[0].rpartition(".")[0]
    starts = {f"{name}.": f"{stack}.{start}." for name, start in zip(found, layers, strict=True)}
    return {
        name: f"{start}{name.removeprefix(here)}"
        for here, start in starts.items()
        if here != start
        for name in persistent_names(model)
        if name.startswith(here)
    }
