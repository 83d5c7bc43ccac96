"""Packing and joining lose nothing and waste little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.contract.errors import DataError
from llmtune.data import DataConfig, TokenSamples, concatenate, pack
from llmtune.data.units import make_units, pack_in_order, whole


def packs(lengths: Any, room: int) -> list[tuple[int, ...]]:
    units = pack(lengths, room)
    return [tuple(units[unit]) for unit in range(len(units))]


def samples(lengths: list[int], rows: list[int] | None = None, **more: Any) -> TokenSamples:
    """Text whose token ids count up from 0, all trained."""
    stops = np.cumsum(lengths)
    pairs = [
        (np.arange(stop - length, stop), np.ones(length, bool)) for stop, length in zip(stops, lengths, strict=True)
    ]
    return TokenSamples.from_lists(pairs, rows or range(len(lengths)), **more)


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_packing_keeps_every_sample_once_and_no_pack_overflows(lengths: list[int], room: int) -> None:
    found = packs(lengths, room)
    assert sorted(sample for row in found for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= room for row in found)
    assert found == packs(np.array(lengths, dtype=np.int32), room) == sorted(found)
    units = pack(lengths, room)
    assert units.tokens.tolist() == [sum(lengths[sample] for sample in row) for row in found]
    assert units.sums(np.arange(len(lengths))).tolist() == [sum(row) for row in found]


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_packs_in_order_are_full_and_keep_the_order(lengths: list[int], room: int) -> None:
    units = pack_in_order(lengths, room)
    found = [units[unit] for unit in range(len(units))]
    assert [sample for row in found for sample in row] == list(range(len(lengths)))
    tokens = [sum(lengths[sample] for sample in row) for row in found]
    assert tokens == units.tokens.tolist() and all(each <= room for each in tokens)
    assert all(each + lengths[after[0]] > room for each, after in zip(tokens, found[1:], strict=False))


def test_without_shuffling_packed_steps_follow_the_files() -> None:
    """Best fit would put the samples 0 and 2 into one step, and 1 and 6 into the next."""
    lengths = [30, 60, 30, 60, 60, 30, 30]
    units = make_units(samples(lengths), DataConfig(packing=True, cutoff_len=64, disable_shuffling=True), 0)
    assert [units[unit] for unit in range(len(units))] == [[0], [1], [2], [3], [4], [5, 6]]


def one_by_one(lengths: list[int], room: int) -> list[int]:
    """Tokens of the packs of best-fit decreasing, one sample at a time."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [number for number, tokens in enumerate(filled) if tokens + length <= room]
        if fits:
            filled[max(fits, key=filled.__getitem__)] += length
        else:
            filled.append(length)
    return sorted(filled)


@given(st.lists(st.integers(1, 30), max_size=120), st.integers(30, 70))
def test_placing_samples_of_one_length_together_is_best_fit_decreasing(lengths: list[int], room: int) -> None:
    assert sorted(pack(lengths, room).tokens.tolist()) == one_by_one(lengths, room)


def test_packing_fills_rows_to_99_percent_on_lengths_like_alpacas() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.1, 0.6, 5000).astype(int), 10, 2048)
    assert pack(lengths, 2048).fill >= 0.99


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert packs([6, 5, 4, 3, 2], 10) == [(0, 2), (1, 3, 4)]
    assert packs([10, 10], 10) == [(0,), (1,)]
    assert packs([], 10) == []
    with pytest.raises(DataError, match="11 tokens does not fit into 10"):
        pack([3, 11], 10)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(2, 25), st.sampled_from([None, 0, 1]))
def test_joined_rows_hold_every_token_once_in_the_order_of_the_documents(
    lengths: list[int], room: int, seed: int | None
) -> None:
    text = samples(lengths)
    units = concatenate(text, room, seed)
    total = sum(lengths)
    assert len(units) == -(-total // room) and units.tokens.tolist()[:-1] == [room] * (len(units) - 1)
    assert int(units.tokens.sum()) == total
    laid = []
    for unit in range(len(units)):
        pieces = [text.ids[text.sequences(s)[0]][first:stop] for s, first, stop in units.pieces(unit)]
        assert sum(map(len, pieces)) == units.tokens[unit]
        laid += np.concatenate(pieces).tolist()
    order = list(dict.fromkeys(s for unit in range(len(units)) for s in units[unit]))
    assert sorted(order) == list(range(len(lengths)))
    assert laid == np.concatenate([text.sample(sample)[0] for sample in order]).tolist()
    if seed is None:
        assert order == sorted(order)


def test_the_order_of_joined_documents_is_drawn_and_parts_of_one_text_stay_together() -> None:
    text = samples([5] * 30, rows=[number // 3 for number in range(30)])
    orders = []
    for seed in (0, 0, 1):
        units = concatenate(text, 7, seed)
        orders.append(list(dict.fromkeys(s for unit in range(len(units)) for s in units[unit])))
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2])
    for order in orders:
        assert all(
            order[at] % 3 == 0 and order[at : at + 3] == [order[at] + n for n in range(3)] for at in range(0, 30, 3)
        )


def test_pairs_stay_whole() -> None:
    """A pack has room for two answers of `cutoff_len`, as a padded pair has; joined rows would mix the two."""
    pairs = samples([7, 8, 2, 3, 8, 8], rows=[0, 1, 2], width=2, kind="preference")
    units = make_units(pairs, DataConfig(packing=True, cutoff_len=8), 0)
    assert units.room == 16 and [units[unit] for unit in range(len(units))] == [[0], [1], [2]]
    roomy = make_units(pairs, DataConfig(packing=True, cutoff_len=10), 0)
    assert [roomy[unit] for unit in range(len(roomy))] == [[0, 1], [2]] and roomy.tokens.tolist() == [20, 16]
    with pytest.raises(DataError, match="neat_packing: found false, but the two answers"):
        make_units(pairs, DataConfig(packing=True, neat_packing=False, cutoff_len=8), 0)


def test_whole_samples_are_units_of_their_own() -> None:
    units = whole(np.array([3, 1, 2]))
    assert len(units) == 3 and [units[unit] for unit in range(3)] == [[0], [1], [2]]
    assert [piece.stop for piece in units.pieces(1)] == [None] and units.tokens.tolist() == [3, 1, 2]
