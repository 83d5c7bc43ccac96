"""What an optimiser is told, what makes it, and what it may offer besides `step`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ParameterRole = Literal["matrix", "convolution", "embedding", "head", "norm", "bias", "adapter_a", "adapter_b"]
"""What a parameter is for: the weight of a layer (a matrix or a stack of them), of a convolution, of an embedding or of
an output head; the scale of a norm, or any other vector; a bias; a factor of a low-rank adapter, at its inputs (a) or
its outputs (b)."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of one role that train at one rate."""

    role: ParameterRole
    parameters: Sequence[tuple[str, nn.Parameter]]
    """Names and parameters in the model's order; on several ranks `DTensor`s."""
    lr: float
    """The recipe's learning rate times `lr_factor`, where its group of the optimiser has to begin."""
    lr_factor: float = 1.0
    """What the peft method asks for, see `ModelEdit.lr_factor`."""
    decays: bool = True
    """Whether weight decay is for it: matrices of any role have it, norms, biases and other vectors never."""


@dataclass(frozen=True, kw_only=True)
class OptimizerContext:
    """What an optimiser may know of the model and the run. Plain values, the same on every rank."""

    learning_rate: float
    """The recipe's."""
    hidden_size: int = 0
    """Numbers of a hidden state."""
    heads: int = 0
    """Query heads of a layer."""
    key_value_heads: int = 0
    head_size: int = 0
    """Numbers of a head."""
    layers: Sequence[str] = ()
    """Names of the transformer layers, in order."""
    text_layers: Sequence[str] = ()
    """Those of them that read text, whose heads are told here; layers of towers have heads of their own."""
    new: frozenset[str] = frozenset()
    """Names of parameters that started from no file and train: value heads, heads of rewards, adapters."""
    seed: int = 0
    """The recipe's, for methods that draw random numbers; from it and a parameter's name, never from torch's state."""


class OptimizerFactory(Protocol):
    """Makes the optimiser for the parameters that train."""

    def create(self, groups: Sequence[ParameterGroup], context: OptimizerContext) -> torch.optim.Optimizer:
        """An optimiser that holds each parameter once, in groups whose `lr` is the `ParameterGroup`'s.

        The core multiplies each group's first `lr` by the schedule. State is in `state[parameter]`: plain numbers, and
        tensors that are spread like their parameter (or see `Repacks` and `SpreadsState`).
        """
        ...


@runtime_checkable
class ChecksGroups(Protocol):
    """Optional on an `OptimizerFactory` that cannot take every model: what speaks against it before a run starts."""

    def check_groups(self, groups: Sequence[ParameterGroup]) -> Iterable[str]:
        """Objections to the parameters that would train, one sentence each, beginning with a key of its block or with
        the optimiser's name. The parameters are on the meta device, or whole."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """Optional on an `OptimizerFactory` and on a `Schedule`: what a plan tells of it that is no mistake, such as a key
    that means less in this run than one might think."""

    def remarks(self, groups: Sequence[ParameterGroup], total_steps: int, warmup_steps: int) -> Iterable[str]:
        """Sentences, each beginning with a key of its block. The parameters are on the meta device, or whole."""
        ...


@runtime_checkable
class UpdatesInBackward(Protocol):
    """Optional on an `OptimizerFactory` whose optimiser can update each parameter as soon as its gradient is there.

    No more than a few gradients are then there at a time. The core refuses what needs them all: several micro-batches a
    step, a limit on their common norm, and loss scaling.
    """

    layerwise: bool
    """Whether the recipe wants it. Then the optimiser is a `StepsEach`, and its `step` is never called."""


@runtime_checkable
class StepsEach(Protocol):
    """An optimiser for `UpdatesInBackward`."""

    def step_parameter(self, parameter: nn.Parameter) -> None:
        """Update one parameter, which has its gradient, and its state. Called in the backward pass, on every rank."""
        ...


@runtime_checkable
class SpreadsState(Protocol):
    """Optional on an optimiser whose state has tensors of other shapes than the parameter's, such as low-rank factors.

    On several ranks each is a `DTensor` over the parameter's ranks. A checkpoint holds it whole, so that a run goes on
    with any number of ranks.
    """

    def empty_state(self, parameter: nn.Parameter, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor of the whole `shape`, spread over the parameter's ranks as the state `key` is."""
        ...


@runtime_checkable
class ChangesWhatTrains(Protocol):
    """Optional on an optimiser under which only some of its parameters train at a time."""

    def at_step(self, step: int) -> None:
        """Called before the 0-based `step` is done, on every rank. It may switch off `requires_grad` of parameters that
        it holds, for this step, and begin their state anew; a function of `step`, as a continued run begins with any.
        """
        ...


@runtime_checkable
class Repacks(Protocol):
    """Optional on an optimiser whose state of a parameter is in a form of its own, such as 8-bit blocks.

    With it a run continues on another number of ranks; without it, only where every rank holds the same piece of each
    parameter as before. The plain numbers in the state (a step counter) are the core's to keep.
    """

    def unpack(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """State of one rank's piece of a parameter as plain tensors of that piece's shape."""
        ...

    def pack(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `unpack` gave, for the piece of `parameter` that this rank holds, as this optimiser keeps it.

        Whole numbers of blocks that were packed before come out as they were.
        """
        ...
