"""4-bit weights: the layer, the bytes it holds, and the rule that makes them, whole or this rank's rows only.

A weight is cut into blocks of 64 numbers. Each block keeps its largest magnitude (`absmax`) and, for every number,
which of sixteen multiples of it comes nearest: two numbers a byte. With double quantisation the maxima are stored in
8 bits, in blocks of 256, after their mean (`offset`) is taken off. QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune import Part

BLOCK = 64
"""Numbers that share one maximum."""
NESTED_BLOCK = 256
"""Maxima that share one maximum, with double quantisation."""


def blocks(numbers: int) -> int:
    """How many blocks begin in `numbers` numbers."""
    return -(-numbers // BLOCK)


@lru_cache
def codes(kind: str) -> tuple[Tensor, Tensor]:
    """The sixteen values of a 4-bit number and the 256 of a quantised maximum; float32, on CPU."""
    state: Any = quantize_4bit(torch.zeros(BLOCK), blocksize=BLOCK, quant_type=kind, compress_statistics=True)[1]
    return state.code, state.state2.code


@dataclass(frozen=True, kw_only=True)
class FourBits:
    """How numbers are stored."""

    kind: str
    """`nf4` or `fp4`."""
    double: bool
    """Whether the block maxima are quantised too."""
    dtype: torch.dtype
    """Type that weights have before quantisation and after dequantisation."""
    storage: torch.dtype
    """Type whose elements carry the packed bytes."""

    def rows(self, numbers: int) -> int:
        """Elements of `storage` that hold so many 4-bit numbers."""
        return -(-numbers // (2 * self.storage.itemsize))

    def quantise(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Any tensor, from the start of a block on, to (bytes, block maxima in float32), both flat."""
        flat = numbers.reshape(-1).to(self.dtype)
        if not flat.numel():
            return flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
        packed, state = quantize_4bit(flat, blocksize=BLOCK, quant_type=self.kind)
        return packed.reshape(-1), state.absmax

    def pack(self, packed: Tensor, rows: int) -> Tensor:
        """Flat bytes as `(rows, 1)` of the storage type; a last element that is not full ends in zeros."""
        room = packed.new_zeros(rows * self.storage.itemsize)
        room[: packed.numel()] = packed
        return room.view(self.storage).unsqueeze(1)

    def statistics(self, absmax: Tensor) -> dict[str, Tensor]:
        """The block maxima of a whole weight as bitsandbytes uses them."""
        if not self.double:
            return {"absmax": absmax}
        offset = absmax.mean()
        small, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        return {"absmax": small, "nested_absmax": nested.absmax, "offset": offset}

    @property
    def absmax_bytes(self) -> int:
        """Bytes of one block's maximum."""
        return 1 if self.double else 4

    def empty_statistics(self, numbers: int) -> dict[str, Tensor]:
        """What a layer of so many numbers stores besides them, on the meta device.

        `absmax` is as long as the storage type makes it: like the packed numbers it is sharded over ranks, and travels
        as it is. The others are a thousandth of its size and less.
        """
        count = blocks(numbers)
        rows = -(-count * self.absmax_bytes // self.storage.itemsize)
        found = {"absmax": torch.empty(rows, dtype=self.storage, device="meta")}
        if self.double:
            found["nested_absmax"] = torch.empty(-(-count // NESTED_BLOCK), device="meta")
            found["offset"] = torch.empty((), device="meta")
        return found

    def store_absmax(self, absmax: Tensor, rows: int, skip: int = 0) -> Tensor:
        """Block maxima, as `statistics` gives them, as `rows` elements of the storage type, leaving out `skip` bytes at
        the start."""
        return self.pack(absmax.contiguous().view(torch.uint8)[skip : skip + rows * self.storage.itemsize], rows)[:, 0]

    def statistics_of(self, stored: Mapping[str, Tensor], numbers: int) -> dict[str, Tensor]:
        """What `statistics` gave, from what a layer stores; shares memory."""
        absmax = stored["absmax"].view(torch.uint8)[: blocks(numbers) * self.absmax_bytes]
        return {**stored, "absmax": absmax if self.double else absmax.view(torch.float32)}

    def state(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], code: Tensor, nested_code: Tensor
    ) -> QuantState:
        """bitsandbytes' description of a weight of `shape` (out, in) with these `statistics`."""
        common = {"blocksize": BLOCK, "quant_type": self.kind, "dtype": self.dtype, "shape": torch.Size(shape)}
        if not self.double:
            return QuantState(absmax=parts["absmax"], code=code, **common)
        nested = QuantState(
            absmax=parts["nested_absmax"], code=nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        return QuantState(absmax=parts["absmax"], code=code, offset=parts["offset"], state2=nested, **common)

    def dequantise(
        self, packed: Tensor, shape: tuple[int, int], parts: Mapping[str, Tensor], code: Tensor, nested_code: Tensor
    ) -> Tensor:
        """Flat bytes back to a weight of `shape`.

        As one long row: bitsandbytes' CPU kernel (0.50.2) begins a block with every row, which is wrong where rows are
        no multiple of 64 (by half the weights' size at 32 columns).
        """
        state = self.state((1, shape[0] * shape[1]), parts, code, nested_code)
        return dequantize_4bit(packed, state).view(shape)

    def unpack(self, packed: Tensor, numbers: int) -> Tensor:
        """`(rows, 1)` of the storage type as bytes `(numbers / 2, 1)`; shares memory."""
        return packed.view(torch.uint8).reshape(-1, 1)[: -(-numbers // 2)]


class Linear4bit(bnb.nn.Linear4bit):
    """`x W^T + b` with W (out, in) stored in 4 bits. A subclass of bitsandbytes' layer so that others recognise it.

    The packed weight and its block maxima are plain parameters, what little else there is are buffers, so that the
    model can be moved, sharded and loaded by means that know nothing of bitsandbytes.
    """

    def __init__(self, shape: tuple[int, int], bias: bool, bits: FourBits, compute_dtype: torch.dtype) -> None:
        super().__init__(
            shape[1],
            shape[0],
            bias,
            compute_dtype=compute_dtype,
            compress_statistics=bits.double,
            quant_type=bits.kind,
            quant_storage=bits.storage,
            device="meta",
        )
        self.bits = bits
        self.numbers = shape[0] * shape[1]
        packed = torch.empty(bits.rows(self.numbers), 1, dtype=bits.storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._describe_weight()
        for name, empty in bits.empty_statistics(self.numbers).items():
            if name == "absmax":
                self.absmax = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        code, nested_code = codes(bits.kind)
        self.register_buffer("code", code, persistent=False)
        self.register_buffer("nested_code", nested_code, persistent=False)

    def _describe_weight(self) -> None:
        # PEFT reads these two off the weight when it wraps the layer.
        weight: Any = self.weight
        weight.compress_statistics = self.bits.double
        weight.quant_type = self.bits.kind

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        super()._apply(fn, recurse)
        self._describe_weight()  # moving makes a new parameter
        return self

    def statistics(self) -> list[Tensor]:
        """The tensors that belong to this weight alone."""
        return [getattr(self, name) for name in self.bits.empty_statistics(0)]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        # bitsandbytes' version looks for the statistics on the weight; here they are tensors like any other.
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def parts(self) -> dict[str, Tensor]:
        """The block maxima this layer holds now. Collective if they are sharded."""
        stored = {name: getattr(self, name) for name in ("absmax", "nested_absmax", "offset") if hasattr(self, name)}
        return self.bits.statistics_of({name: _whole(tensor) for name, tensor in stored.items()}, self.numbers)

    def state(self) -> QuantState:
        """bitsandbytes' description of the weight this layer holds now."""
        return self.bits.state((self.out_features, self.in_features), self.parts(), self.code, self.nested_code)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`. bitsandbytes' own forward may repack the weight in place."""
        wide = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        if wide.device.type == "cpu" and self.in_features % BLOCK:
            return F.linear(wide, self.dequantize().to(wide.dtype), bias).to(x.dtype)  # see FourBits.dequantise
        packed = self.bits.unpack(self.weight.detach(), self.numbers)
        # Transposed: up to bitsandbytes 0.49 that marks a weight of (out, in); later ones take either.
        return bnb.matmul_4bit(wide, packed.t(), quant_state=self.state(), bias=bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        """W as (out, in) in its original type. Collective if the weight is sharded; empty if it is on meta."""
        if self.weight.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.bits.dtype, device="meta")
        shape, packed = (self.out_features, self.in_features), self.bits.unpack(_whole(self.weight), self.numbers)
        return self.bits.dequantise(packed, shape, self.parts(), self.code, self.nested_code)

    @property
    def W_q(self) -> Tensor:
        """Its presence makes PEFT call `dequantize` where it needs the plain weight (DoRA)."""
        return self.weight


def _whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class FourBitRule:
    """Load rule: a linear layer's weight to packed bytes and block maxima."""

    layer: str
    shape: tuple[int, int]
    """(out, in), as the layer uses it."""
    bits: FourBits
    transposed: bool = False
    """Whether the source is (in, out), as in GPT-2's Conv1D."""

    @property
    def source(self) -> str:
        """The weight as the model had it."""
        return f"{self.layer}.weight"

    @property
    def targets(self) -> tuple[str, ...]:
        """The packed weight, under the same name, and its statistics."""
        return (self.source, *(f"{self.layer}.{name}" for name in self.bits.empty_statistics(0)))

    @property
    def numbers(self) -> int:
        """How many weights there are."""
        return self.shape[0] * self.shape[1]

    def convert(self, source: Tensor) -> dict[str, Tensor]:
        """The same bytes as bitsandbytes gives for the tensor in the run's compute type."""
        packed, absmax = self.bits.quantise(source.t() if self.transposed else source)
        made = self.bits.statistics(absmax)
        made["absmax"] = self.bits.store_absmax(made["absmax"], len(self.bits.empty_statistics(self.numbers)["absmax"]))
        return self._named(self.bits.pack(packed, self.bits.rows(self.numbers)), made)

    def convert_part(self, part: Part) -> dict[str, Tensor] | None:
        """Bytes of this rank's rows. With double quantisation the maxima of all blocks have to be known everywhere for
        a moment: each rank gives those of the blocks that begin in its rows."""
        if self.transposed:
            return None
        start, stop = part.rows(self.source)
        absmax_start, absmax_stop = part.rows(self.targets[1])
        first, last = (min(row * 2 * self.bits.storage.itemsize, self.numbers) for row in (start, stop))
        # Rows need not end where blocks end, so the blocks they touch are quantised whole and cut. Nor does a rank keep
        # just the maxima of its own rows; those of a few blocks more or less are at hand or computed here.
        touched = [(first // BLOCK, blocks(last))] if first < last else []
        wanted = (0, 0)
        if not self.bits.double and absmax_start < absmax_stop:
            size = self.bits.storage.itemsize
            wanted = (absmax_start * size // 4, min(-(-absmax_stop * size // 4), blocks(self.numbers)))
            touched.append(wanted)
        low, high = min((low for low, _ in touched), default=0), max((high for _, high in touched), default=0)
        packed, absmax = self.bits.quantise(part.elements(low * BLOCK, min(high * BLOCK, self.numbers)))
        own_at = (first - low * BLOCK) // 2
        own = packed[own_at : own_at + -(-(last - first) // 2)] if first < last else packed[:0]
        if self.bits.double:
            begun = absmax[blocks(first) - low :] if first < last else absmax[:0]
            made = self.bits.statistics(part.concatenate(begun))
            skip = absmax_start * self.bits.storage.itemsize
        else:
            made = {"absmax": absmax[wanted[0] - low : wanted[1] - low]}
            skip = absmax_start * self.bits.storage.itemsize - 4 * wanted[0]
        made["absmax"] = self.bits.store_absmax(made["absmax"], absmax_stop - absmax_start, max(skip, 0))
        return self._named(self.bits.pack(own, stop - start), made)

    def restore(self, targets: Mapping[str, Tensor]) -> Tensor:
        """The dequantised weight in its original orientation."""
        stored = {name.rpartition(".")[2]: tensor for name, tensor in targets.items()}
        packed = stored.pop("weight")
        parts = self.bits.statistics_of(stored, self.numbers)
        code, nested_code = (values.to(packed.device) for values in codes(self.bits.kind))
        whole = self.bits.dequantise(self.bits.unpack(packed, self.numbers), self.shape, parts, code, nested_code)
        return whole.t().contiguous() if self.transposed else whole

    def _named(self, packed: Tensor, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{self.layer}.{name}": tensor for name, tensor in {"weight": packed, **statistics}.items()}
