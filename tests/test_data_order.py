"""Packing loses nothing and wastes little; the order of samples is a function of seed and step."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data import Order, pack, split
from llmtune.errors import DataError


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_packing_keeps_every_sample_once_and_no_row_overflows(lengths: list[int], cutoff_len: int) -> None:
    rows = pack(lengths, cutoff_len)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= cutoff_len for row in rows)
    assert rows == pack(np.array(lengths, dtype=np.int32), cutoff_len)


def test_packing_fills_rows_to_99_percent_on_lengths_like_alpacas() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.1, 0.6, 5000).astype(int), 10, 2048)
    rows = pack(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) >= 0.99


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [(0, 2), (1, 3, 4)]
    assert pack([10, 10], 10) == [(0,), (1,)]
    assert pack([], 10) == []
    with pytest.raises(DataError, match="11 tokens does not fit into cutoff_len=10"):
        pack([3, 11], 10)


def test_every_epoch_holds_every_unit_once_in_another_order() -> None:
    order = Order(units=10, batch=4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [[order.step_units(epoch * 3 + step) for step in range(3)] for epoch in range(2)]
    assert [[len(units) for units in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    flat = [list(chain.from_iterable(epoch)) for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10)) and flat[0] != flat[1]


def test_a_step_depends_on_nothing_but_seed_and_number() -> None:
    one, other = Order(100, 7, seed=5), Order(100, 7, seed=5)
    steps = [one.step_units(step) for step in range(40)]
    assert [other.step_units(step) for step in reversed(range(40))] == steps[::-1]
    assert steps[0] == np.random.default_rng([5, 0]).permutation(100)[:7].tolist()
    assert steps != [Order(100, 7, seed=6).step_units(step) for step in range(40)]


def test_without_shuffling_the_files_order_stays() -> None:
    order = Order(5, 2, seed=1, shuffle=False)
    assert [order.step_units(step) for step in range(6)] == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]


def test_fewer_units_than_a_batch_make_one_step_an_epoch() -> None:
    order = Order(3, 64, seed=0)
    assert order.steps_per_epoch == 1 and sorted(order.step_units(9)) == [0, 1, 2]
    with pytest.raises(DataError, match="found 0 samples"):
        Order(0, 4, seed=0)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_and_micro_steps_share_a_batch_evenly(units: int, ranks: int, micro_steps: int) -> None:
    parts = [split(range(units), rank, ranks, micro_steps) for rank in range(ranks)]
    assert all(len(part) == micro_steps for part in parts)
    pieces = [parts[rank][micro] for micro in range(micro_steps) for rank in range(ranks)]
    assert list(chain.from_iterable(pieces)) == list(range(units))
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
