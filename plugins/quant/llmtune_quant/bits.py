"""Numbers of 1 to 8 bits in bytes, without waste: 3 bits are packed as 2 and 1, 5 as 4 and 1, and so on."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that hold `count` numbers of so many bits."""
    return sum(-(-count * width // 8) for width in _widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flat uint8 numbers below `2 ** bits` to bytes."""
    pieces, low = [], 0
    for width in _widths(bits):
        slots = 8 // width
        piece = (codes >> low) & ((1 << width) - 1)
        piece = torch.nn.functional.pad(piece, (0, -piece.numel() % slots)).view(-1, slots)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        pieces.append((piece << shifts).sum(1, dtype=torch.uint8))
        low += width
    return torch.cat(pieces)


def unpack(stored: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` numbers of what `pack` gave, as uint8; further bytes may follow."""
    codes, low, at = None, 0, 0
    for width in _widths(bits):
        size = -(-count * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=stored.device)
        piece = ((stored[at : at + size, None] >> shifts) & ((1 << width) - 1)).reshape(-1)[:count] << low
        codes = piece if codes is None else codes | piece
        low, at = low + width, at + size
    assert codes is not None
    return codes


def _widths(bits: int) -> list[int]:
    """The powers of two that make up `bits`, largest first: each divides a byte."""
    return [width for width in (8, 4, 2, 1) if bits & width]
