"""Mixing draws what `datasets.interleave_datasets` draws, from samples in a drawn order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llmtune.contract.errors import DataError
from llmtune.data import DataConfig, TokenSamples
from llmtune.data.mixing import counts, draw, mixed

SIZES = [5, 30, 12]
SHARES = (0.2, 0.5, 0.3)


def samples(sizes: list[int]) -> TokenSamples:
    pairs = [
        (np.array([set_, number, 1]), np.ones(3, bool)) for set_, size in enumerate(sizes) for number in range(size)
    ]
    return TokenSamples.from_lists(
        pairs,
        range(len(pairs)),
        sets=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        set_names=["a", "b", "c"],
    )


def config(strategy: str, **more: Any) -> DataConfig:
    return DataConfig(dataset=("a", "b", "c"), mix_strategy=strategy, **more)  # type: ignore[arg-type]


def drawn(found: TokenSamples) -> list[tuple[int, int]]:
    return [tuple(found.sample(index)[0][:2].tolist()) for index in range(len(found))]


@pytest.mark.parametrize("shares", [None, SHARES])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_draws_are_those_of_datasets(over: bool, shares: tuple[float, ...] | None, seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    sets = [datasets.Dataset.from_dict({"set": [n] * size, "place": range(size)}) for n, size in enumerate(SIZES)]
    expected = datasets.interleave_datasets(
        sets, probabilities=list(shares) if shares else None, seed=[seed, 2**31 + 1],
        stopping_strategy="all_exhausted" if over else "first_exhausted",
    )  # fmt: skip
    found = draw(SIZES, over=over, probabilities=shares, seed=seed)
    assert [found[0].tolist(), found[1].tolist()] == [expected["set"][:], expected["place"][:]]


def test_concat_takes_all_of_each_once() -> None:
    everything = samples(SIZES)
    assert mixed(everything, config("concat"), 0) is everything and counts(everything, everything) == []


def test_under_stops_with_the_first_set_used_up_and_takes_no_sample_twice() -> None:
    found = mixed(samples(SIZES), config("interleave_under", interleave_probs=SHARES), 3)
    pairs = drawn(found)
    by_set = Counter(number for number, _ in pairs)
    assert len(set(pairs)) == len(pairs)
    assert any(by_set[number] == size for number, size in enumerate(SIZES)), "one set is used up"
    assert all(by_set[number] <= size for number, size in enumerate(SIZES))
    assert found.sets.tolist() == [number for number, _ in pairs]
    inturn = Counter(number for number, _ in drawn(mixed(samples(SIZES), config("interleave_under"), 3)))
    assert inturn == {0: 5, 1: 5, 2: 5}


def test_over_uses_up_every_set_and_repeats_in_whole_passes() -> None:
    found = drawn(mixed(samples(SIZES), config("interleave_over", interleave_probs=SHARES), 3))
    times = Counter(found)
    for number, size in enumerate(SIZES):
        each = [times[number, place] for place in range(size)]
        assert min(each) >= 1 and max(each) - min(each) <= 1
    inturn = Counter(number for number, _ in drawn(mixed(samples(SIZES), config("interleave_over"), 3)))
    assert inturn == {0: 30, 1: 30, 2: 30}


def test_shares_are_those_asked_for_and_the_seed_decides_alone() -> None:
    sizes = [4000, 9000, 7000]
    first, again, other = (
        mixed(samples(sizes), config("interleave_under", interleave_probs=SHARES), s) for s in (5, 5, 6)
    )
    shares = np.bincount(first.sets) / len(first)
    assert shares == pytest.approx(SHARES, abs=0.02)
    assert drawn(first) == drawn(again) != drawn(other)
    assert {place for number, place in drawn(first) if number == 0} != set(range(int((first.sets == 0).sum())))
    assert first.ids is samples(sizes).ids or len(first.ids) == 3 * sum(sizes), "tokens stay where they are"


def test_without_shuffling_each_set_keeps_its_order() -> None:
    found = drawn(mixed(samples(SIZES), config("interleave_over", disable_shuffling=True), 0))
    assert found[:9] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)]
    assert [place for number, place in found if number == 0][:6] == [0, 1, 2, 3, 4, 0]


def test_what_cannot_be_mixed_is_said() -> None:
    with pytest.raises(DataError, match='mix_strategy: "b" has no samples to draw'):
        mixed(samples([3, 0, 2]), config("interleave_over"), 0)
    with pytest.raises(DataError, match="interleave_probs: an epoch would have about"):
        draw([10, 10**6], over=True, probabilities=(1 - 1e-6, 1e-6), seed=0)
    everything = samples(SIZES)
    said = counts(mixed(everything, config("interleave_over"), 0), everything)
    assert said == ["30 of a (5)", "30 of b (30)", "30 of c (12)"]
