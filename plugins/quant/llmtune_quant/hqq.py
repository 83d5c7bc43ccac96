"""Half-quadratic quantisation: zero points that make the error of a group small in a norm that forgives outliers.

Badri and Shaji, https://mobiusml.github.io/hqq_blog/ (2023). The numbers are those of the package hqq 0.2.8, whose
groups lie along the inputs (its `axis=1`, transformers' default). That package is not used to make them: it has been
without a release since 2025, comes as a source that runs a CUDA build when it is installed, and keeps weights in a form
that cannot be sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import pack, packed_size, unpack
from .packed import as_bytes, scales_from

NORM, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20
"""The authors' settings: the norm's exponent, the penalty, its growth an iteration, and the most iterations."""


@dataclass(frozen=True, kw_only=True)
class HalfQuadratic:
    """Codes of `bits` bits; each group of `group` numbers has a scale and a zero point in the compute type."""

    bits: int
    group: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"hqq {self.bits} bit, groups of {self.group}"

    def size(self, shape: tuple[int, int]) -> int:
        numbers = shape[0] * shape[1]
        return packed_size(numbers, self.bits) + 2 * numbers // self.group * self.dtype.itemsize

    def quantise(self, weight: Tensor) -> Tensor:
        codes, scale, zero = solve(weight.float().reshape(-1, self.group), self.bits)
        return as_bytes(pack(codes.to(torch.uint8).reshape(-1), self.bits), scale.to(self.dtype), zero.to(self.dtype))

    def dequantise(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        numbers = shape[0] * shape[1]
        scale, zero = scales_from(stored, 2 * numbers // self.group, self.dtype).chunk(2)
        codes = unpack(stored, numbers, self.bits).view(-1, self.group).to(self.dtype)
        return ((codes - zero) * scale).view(shape)


def solve(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (number of groups, numbers in each), float32, to codes of the same shape, and a scale and a zero point for
    each, so that `(codes - zero) * scale` comes near the groups."""
    low, high, top = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True), 2**bits - 1
    inverse = torch.where(high - low <= 1e-4, 1.0, top / (high - low)).clamp(max=2e4)
    zero, best, beta = -low * inverse, torch.inf, BETA
    for _ in range(ITERATIONS):
        codes = (groups * inverse + zero).round().clamp(0, top)
        error = groups - (codes - zero) / inverse
        shrunk = error.sign() * (error.abs() - error.abs().pow(NORM - 1) / beta).clamp(min=0)
        # The authors stop after the update that follows the first error that is no better, not before it.
        zero = (codes - (groups - shrunk) * inverse).mean(1, keepdim=True)
        beta *= KAPPA
        if (mean := error.abs().mean().item()) >= best:
            break
        best = mean
    return (groups * inverse + zero).round().clamp(0, top), 1 / inverse, zero
