"""How tensors of a checkpoint become those of the model: rules, the view that a rule has of a tensor, and readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorPart(Protocol):
    """One rank's view of a tensor that is being loaded; see `LoadRule.convert_part`."""

    shape: tuple[int, ...]
    """Full shape of the source tensor."""

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened source."""
        ...

    def rows(self, target: str) -> tuple[int, int]:
        """Rows `[start, stop)` of the target that this rank keeps."""
        ...

    def concatenate(self, piece: Tensor) -> Tensor:
        """Join the 1-D pieces of all ranks, in rank order. Every rank must call it."""
        ...


class LoadRule(Protocol):
    """How one tensor of the original model becomes other tensors, and back.

    `source` and `targets` are names in the model: `source` as the edit found it, `targets` as it left it.
    Renames by later edits are followed by the core.
    """

    source: str
    targets: tuple[str, ...]

    def convert(self, source: Tensor) -> Mapping[str, Tensor]:
        """Whole source tensor to whole targets."""
        ...

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Whole targets back to the source, for export and merge."""
        ...

    def convert_part(self, part: TensorPart) -> Mapping[str, Tensor] | None:
        """This rank's rows only, or None where the rule needs the whole tensor."""
        ...


class WeightRule(Protocol):
    """How a weight of the model changes on its way in, before a load rule stores it otherwise (quantises it).

    What the rule gives is the model's weight from then on.
    """

    source: str
    """The weight, named as the edit found it."""
    targets: tuple[str, ...]
    """New tensors that get their values from it, named as the edit left them; there may be none."""
    new: bool
    """Whether the targets start here, and are not what an earlier run has trained."""
    files: tuple[Path, ...]
    """What it reads besides the weight: with other files the model is another one."""

    def convert(self, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(what takes the weight's place, whole targets), from the whole weight as its file has it.

        Called on every rank, in one order, with torch's CPU generator seeded from the recipe's seed and the name.
        """
        ...


class TensorReader(Protocol):
    """Reads tensors of a checkpoint folder; handed to an init plugin."""

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def read(self, key: str) -> Tensor: ...

    def rows(self, key: str, start: int, stop: int) -> Tensor: ...
