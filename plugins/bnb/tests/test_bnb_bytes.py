"""The bytes: equal to bitsandbytes' own, whole or in pieces."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from llmtune_bnb.eight import Int8Rule
from llmtune_bnb.four import FourBitRule, FourBits, codes
from torch import Tensor


class Ranks:
    """Plays the core for several ranks in turn: FSDP2's split of rows, and a gather that waits for all."""

    def __init__(self, source: Tensor, rule: FourBitRule, size: int) -> None:
        self.source, self.size = source, size
        absmax = len(rule.bits.empty_statistics(rule.numbers)["absmax"])
        self.lengths = {"layer.weight": rule.bits.rows(rule.numbers), "layer.absmax": absmax}
        self.pieces: list[Tensor] = []

    def bounds(self, target: str, rank: int) -> tuple[int, int]:
        length = self.lengths[target]
        chunk = -(-length // self.size)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def run(self, rule: FourBitRule) -> list[dict[str, Tensor]]:
        for rank in range(self.size):  # first round: collect what each rank contributes
            rule.convert_part(One(self, rank))
        whole = torch.cat(self.pieces) if self.pieces else None
        return [rule.convert_part(One(self, rank, whole)) for rank in range(self.size)]


class One:
    def __init__(self, ranks: Ranks, rank: int, whole: Tensor | None = None) -> None:
        self.ranks, self.rank, self.whole = ranks, rank, whole
        self.shape = tuple(ranks.source.shape)
        self.read: list[tuple[int, int]] = []

    def elements(self, start: int, stop: int) -> Tensor:
        self.read.append((start, stop))
        return self.ranks.source.reshape(-1)[start:stop]

    def rows(self, target: str) -> tuple[int, int]:
        return self.ranks.bounds(target, self.rank)

    def concatenate(self, piece: Tensor) -> Tensor:
        if self.whole is not None:
            return self.whole
        self.ranks.pieces.append(piece)
        return piece if piece.numel() else torch.ones(1)


def rule_for(shape: tuple[int, int], kind: str, double: bool, storage: torch.dtype) -> FourBitRule:
    bits = FourBits(kind=kind, double=double, dtype=torch.float32, storage=storage)
    return FourBitRule("layer", shape, bits)


def statistics(made: dict[str, Tensor], shape: tuple[int, int], double: bool) -> dict[str, Tensor]:
    stored = {name.removeprefix("layer."): tensor for name, tensor in made.items()}
    bits = FourBits(kind="nf4", double=double, dtype=torch.float32, storage=made["layer.weight"].dtype)
    return bits.statistics_of(stored, shape[0] * shape[1])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48, 80), (32, 64), (7, 24)])
def test_whole_weight_has_bitsandbytes_bytes(kind: str, double: bool, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = rule_for(shape, kind, double, torch.float32).convert(weight)
    packed, state = quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=double, quant_storage=torch.float32
    )
    assert torch.equal(made["layer.weight"].view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(statistics(made, shape, double)["absmax"], state.absmax)
    if double:
        assert torch.equal(made["layer.nested_absmax"], state.state2.absmax)
        assert torch.equal(made["layer.offset"], state.offset)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
# 48x80 in float32 rows: 480 rows, aligned splits. 7x24: 21 rows of 8 numbers, splits inside blocks and an empty rank.
# 3x6: a single block, in rows the last of which is not full.
@pytest.mark.parametrize("shape", [(48, 80), (7, 24), (30, 50), (3, 6)])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_pieces_of_all_ranks_join_to_the_whole(
    ranks: int, kind: str, double: bool, shape: tuple[int, int], storage: torch.dtype
) -> None:
    rule = rule_for(shape, kind, double, storage)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    whole = rule.convert(weight)
    pieces = Ranks(weight, rule, ranks).run(rule)
    for name in ("layer.weight", "layer.absmax"):
        joined = torch.cat([piece[name] for piece in pieces])
        assert torch.equal(joined.view(torch.uint8), whole[name].view(torch.uint8)), name
    for name in set(whole) - {"layer.weight", "layer.absmax"}:
        assert all(torch.equal(piece[name], whole[name]) for piece in pieces)


@pytest.mark.parametrize("double", [True, False])
def test_a_rank_reads_only_its_own_part(double: bool) -> None:
    rule = rule_for((48, 80), "nf4", double, torch.float32)
    ranks = Ranks(torch.randn(48, 80), rule, 2)
    one = One(ranks, 1)
    rule.convert_part(one)
    assert one.read == [(1920, 3840)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [True, False])
def test_restore_gives_what_the_bytes_mean(double: bool, transposed: bool) -> None:
    bits = FourBits(kind="nf4", double=double, dtype=torch.float32, storage=torch.bfloat16)
    rule = FourBitRule("layer", (48, 128), bits, transposed)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    back = rule.restore(rule.convert(weight.t().contiguous() if transposed else weight))
    expected = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double))
    assert torch.equal(back, expected.t() if transposed else expected)


@pytest.mark.parametrize("shape", [(32, 32), (48, 80), (7, 24), (3, 6)])
def test_restore_of_rows_that_end_inside_blocks_is_what_the_format_says(shape: tuple[int, int]) -> None:
    """Where bitsandbytes' own CPU kernel is wrong: its blocks begin anew with every row."""
    rule = rule_for(shape, "nf4", False, torch.float32)
    made = rule.convert(torch.randn(shape, generator=torch.Generator().manual_seed(6)))
    packed = made["layer.weight"].view(torch.uint8).flatten()[: rule.numbers // 2].long()
    values = codes("nf4")[0][torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    expected = values * made["layer.absmax"].repeat_interleave(64)[: rule.numbers]
    assert torch.equal(rule.restore(made), expected.view(shape))


def test_weights_are_rounded_to_the_compute_type_first() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    bits = FourBits(kind="nf4", double=False, dtype=torch.bfloat16, storage=torch.bfloat16)
    made = FourBitRule("layer", (32, 64), bits).convert(weight)
    _, state = quantize_4bit(weight.to(torch.bfloat16), blocksize=64, quant_type="nf4")
    assert torch.equal(statistics(made, (32, 64), double=False)["absmax"], state.absmax)


def test_int8_restore_is_within_half_a_step() -> None:
    # Half a step of int8, and up to 127 * 2**-11 steps of rounding to float16 before it.
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    rule = Int8Rule("layer", torch.float32)
    back = rule.restore(rule.convert(weight))
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((back - weight).abs() <= 0.57 * step).all()
