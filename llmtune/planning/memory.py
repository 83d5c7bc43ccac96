"""Bytes on one device, by what they are for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Whole numbers under names; sums, differences and multiples go name by name."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + vars(other)[name] for name, value in asdict(self).items()})

    def __sub__(self, other: Self) -> Self:
        return self + other.times(-1)

    def times(self, factor: int) -> Self:
        """Each number multiplied."""
        return type(self)(**{name: value * factor for name, value in asdict(self).items()})

    def most(self, other: Self) -> Self:
        """The larger of the two, name by name."""
        return type(self)(**{name: max(value, vars(other)[name]) for name, value in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class Memory(Sums):
    """Bytes by category."""

    weights: int = 0
    """The model's weights as this rank holds them (its shard), quantised ones with their statistics."""
    adapters: int = 0
    """Trained parameters that a plugin added to the model."""
    gathered: int = 0
    """Weights that FSDP2 has gathered, and gradients on their way to other ranks."""
    gradients: int = 0
    optimizer: int = 0
    """Optimiser state, and what a step of it needs for a moment."""
    activations: int = 0
    """What the layers keep for the backward pass, and what forward and backward need for a moment."""
    logits: int = 0
    """All that lies between the last layer and the loss, or the token that is drawn."""
    cache: int = 0
    """Keys and values of answers that the model gives."""

    host: int = 0
    """What offloading keeps in host memory; no part of the total."""

    @property
    def total(self) -> int:
        """All categories on the device together."""
        return sum(asdict(self).values()) - self.host


CATEGORIES = tuple(field.name for field in fields(Memory) if field.name != "host")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of one rank over a step."""

    at_peak: Memory
    """At the moment when all categories together are largest."""
    most: Memory
    """The most each category ever needs."""
    moment: str
    """When the peak is: answers, forward, loss, backward, update."""
