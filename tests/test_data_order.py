"""The order of units is a function of seed and step; a step is dealt so that little is padded."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.contract.errors import DataError
from llmtune.data import Order, split
from llmtune.data.order import GROUPED_STEPS, deal, padding_share


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


LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.1, 0.6, 5000).astype(int), 10, 2048)


@given(st.integers(1, 300), st.integers(1, 12), st.booleans())
def test_grouped_by_length_an_epoch_still_holds_every_unit_once(units: int, batch: int, shuffle: bool) -> None:
    lengths = LENGTHS[:units]
    order = Order(units, batch, seed=3, shuffle=shuffle, group_by=lengths)
    again = Order(units, batch, seed=3, shuffle=shuffle, group_by=lengths.copy())
    for epoch in (2, 0, 1):
        steps = [order.step_units(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        assert sorted(chain.from_iterable(steps)) == list(range(units))
        assert [len(step) for step in steps] == [batch] * (units // batch) + [units % batch] * (units % batch > 0)
        assert np.array_equal(order.epoch(epoch), again.epoch(epoch))
    if not shuffle:
        assert order.epoch(5).tolist() == list(range(units))


def test_grouped_steps_come_in_random_order_and_differ_from_epoch_to_epoch() -> None:
    order = Order(4000, 8, seed=1, group_by=LENGTHS[:4000])
    means = [[LENGTHS[order.step_units(epoch * 500 + step)].mean() for step in range(500)] for epoch in range(2)]
    assert abs(np.corrcoef(means[0], np.arange(500))[0, 1]) < 0.1, "short steps must not come first"
    assert set(map(tuple, (sorted(order.step_units(step)) for step in range(500)))).isdisjoint(
        map(tuple, (sorted(order.step_units(500 + step)) for step in range(500)))
    )


def test_few_steps_are_not_the_same_ones_in_every_epoch() -> None:
    """Sorted as a whole, a small set of data would fall into the same steps each time."""
    order = Order(64, 4, seed=1, group_by=np.arange(64))
    steps = [{frozenset(order.step_units(epoch * 16 + step)) for step in range(16)} for epoch in range(6)]
    assert len(set().union(*steps)) > 90


def test_the_last_smaller_step_is_no_selection_by_length() -> None:
    """Sorting must not always leave the longest or the shortest for it."""
    size = 8 * GROUPED_STEPS + 4
    order = Order(size, 8, seed=0, group_by=LENGTHS[:size])
    last = [LENGTHS[order.epoch(epoch)[-4:]].mean() for epoch in range(200)]
    assert np.mean(last) == pytest.approx(LENGTHS[:size].mean(), rel=0.1)


def test_grouping_and_dealing_save_padding() -> None:
    """What is said is what the batches have: longest row times rows, micro-batch by micro-batch."""
    shares = {}
    for grouped in (False, True):
        order = Order(len(LENGTHS), 32, seed=0, group_by=LENGTHS if grouped else None)
        for micros in (1, 8):
            padded = 0
            for step in range(order.steps_per_epoch):
                units = deal(order.step_units(step), LENGTHS, padded=True, pieces=micros)
                parts = [part for part in split(units, 0, 1, micros) if part]
                padded += sum(len(part) * LENGTHS[part].max() for part in parts)
            shares[grouped, micros] = 1 - LENGTHS.sum() / padded
            assert padding_share(LENGTHS, order, micros) == pytest.approx(shares[grouped, micros])
    few = Order(3, 8, seed=0)
    assert padding_share(np.array([4, 2, 4]), few, 1) == pytest.approx(1 - 10 / 12)
    assert padding_share(np.array([4, 2, 4]), few, 8) == 0.0
    assert shares[False, 1] > 0.6 and shares[False, 8] < 0.25
    assert shares[True, 1] < 0.1 and shares[True, 8] < 0.02


@given(st.integers(0, 40), st.integers(1, 6), st.booleans())
def test_dealing_changes_neither_the_units_nor_how_many_each_gets(units: int, pieces: int, padded: bool) -> None:
    chosen = np.random.default_rng(units).permutation(1000)[:units].tolist()
    dealt = deal(chosen, LENGTHS, padded=padded, pieces=pieces)
    assert sorted(dealt) == sorted(chosen)
    parts = split(dealt, 0, 1, pieces)
    assert [len(part) for part in parts] == [len(part) for part in split(chosen, 0, 1, pieces)]


def test_rows_end_to_end_are_dealt_so_that_micro_batches_are_of_one_size() -> None:
    dealt = deal(range(64), LENGTHS, padded=False, pieces=8)
    tokens = [LENGTHS[part].sum() for part in split(dealt, 0, 1, 8)]
    drawn = [LENGTHS[list(part)].sum() for part in split(range(64), 0, 1, 8)]
    assert np.ptp(tokens) < 0.35 * np.ptp(drawn)
    uneven = deal(range(61), LENGTHS, padded=False, pieces=8)
    assert np.ptp([LENGTHS[part].sum() for part in split(uneven, 0, 1, 8)]) < 0.5 * np.ptp(drawn)
