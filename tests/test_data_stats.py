"""Lengths, fill and the cost of cutoffs, against counts made the slow way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmtune
from llmtune.data.stats import CUTOFFS, Cutoff, Rows, make_stats
from llmtune.data.tokens import TokenSamples
from tests.runs import recipe

ROWS = Rows(rows=1, fill=1.0)


def samples_of(masks: list[list[bool]], width: int = 1, **more: Any) -> TokenSamples:
    pairs = [(np.arange(len(mask)), np.array(mask, bool)) for mask in masks]
    return TokenSamples.from_lists(pairs, range(len(masks) // width), width=width, **more)


def stats_of(samples: TokenSamples, cutoff_len: int = 4) -> Any:
    return make_stats(samples, samples, None, cutoff_len=cutoff_len, packed=ROWS, padded=ROWS)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=2, max_size=12),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_a_cutoff_costs_what_counting_says(masks: list[list[bool]], width: int, turned: bool) -> None:
    masks = masks[: len(masks) // width * width]
    samples = samples_of(masks, width)
    order = np.arange(len(samples))[::-1] if turned else np.arange(len(samples))
    found = next(each for each in stats_of(samples.select(order)).cutoffs if each.cutoff_len == 4)
    masks = [[False, *mask[1:]] for mask in masks]  # a first token never trains
    groups = [masks[at : at + width] for at in range(0, len(masks), width)]
    long = [group for group in groups if any(len(mask) > 4 for mask in group)]
    assert found.samples == len(long)
    assert found.tokens == sum(max(0, len(mask) - 4) for mask in masks)
    assert found.supervised_tokens == sum(sum(mask[4:]) for mask in masks)
    assert found.without_target == sum(any(any(mask) and not any(mask[:4]) for mask in group) for group in groups)
    assert found.dropped_tokens == sum(len(mask) for group in long for mask in group)


def test_percentiles_are_lengths_that_enough_samples_do_not_exceed() -> None:
    lengths = [*range(1, 101)]
    found = stats_of(samples_of([[True] * length for length in lengths])).all
    assert found.percentiles == {"50": 50, "90": 90, "95": 95, "99": 99, "99.9": 100}
    assert (found.longest, found.shortest, found.tokens) == (100, 1, sum(lengths))
    assert found.supervised_tokens == sum(lengths) - 100


def test_every_data_set_is_counted_by_itself() -> None:
    samples = samples_of([[True] * 2, [True] * 8, [True] * 3], sets=np.array([0, 1, 0]), set_names=("a", "b"))
    found = stats_of(samples)
    assert [(each.name, each.samples, each.tokens) for each in found.sets] == [("a", 2, 5), ("b", 1, 8)]
    assert "data set" in str(found)


def test_bars_hold_every_sample() -> None:
    found = stats_of(samples_of([[True] * length for length in (1, 2, 3, 4, 5, 16, 17, 100)]))
    assert found.histogram == [(1, 1), (2, 1), (4, 2), (8, 1), (16, 1), (32, 1), (64, 0), (128, 1)]
    assert "100.00%" in str(found)


def test_tables_fit_a_terminal_and_no_number_is_cut() -> None:
    found = stats_of(samples_of([[True] * 2, [True] * 99], sets=np.array([0, 1]), set_names=("a set", "b [b]")))
    found = replace(found, all=replace(found.all, tokens=10**9))
    many = Cutoff(
        cutoff_len=32768, samples=9_999_999, tokens=999_999_999, supervised_tokens=888_888_888,
        without_target=7_777_777, dropped_tokens=999_999_998,
    )  # fmt: skip
    lines = str(replace(found, cutoffs=[many])).splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("with the recipe's cutoff_len")] == []
    assert lines[-1].split()[:3] == ["32,768", "9,999,999", "999,999,999"] and "b [b]" in "".join(lines)
    more = str(replace(found, cutoffs=[replace(many, dropped_tokens=10**30)]))
    assert f"{10**30:,}" in more


@pytest.fixture
def keys(tiny_llama: str, chats: str, tmp_path: Path) -> dict[str, Any]:
    return recipe(tiny_llama, chats, tmp_path / "run")


def test_lengths_are_those_before_the_cutoff(keys: dict[str, Any]) -> None:
    whole, cut = llmtune.stats(keys), llmtune.stats(keys, cutoff_len=40, on_bad_record="skip")
    assert whole.all == cut.all and cut.all.longest > 40
    assert cut.trained.longest <= 40
    assert [each.cutoff_len for each in cut.cutoffs] == [40, *CUTOFFS]
    assert cut.cutoffs[0].samples == int((cut.lengths > 40).sum()) > 0
    assert any("cutoff_len 40" in note for note in cut.notes)


def test_a_cutoff_that_leaves_nothing_is_told_with_the_lengths(keys: dict[str, Any]) -> None:
    found = llmtune.stats(keys, cutoff_len=8)
    assert found.trained is None and found.all.samples == 24
    assert "note: this recipe would not train. " in str(found) and "cutoff_len" in found.notes[0]


def test_fill_and_padding_are_those_of_the_plan(keys: dict[str, Any]) -> None:
    keys = {**keys, "kernel_config": None}  # with kernels nothing is padded
    found = llmtune.stats(keys)
    assert found.padded.fill == pytest.approx(1 - llmtune.plan(keys).data.batches.padding)
    packed = llmtune.plan(keys, packing=True).data.batches
    assert (found.packed.rows, found.packed.fill) == (len(packed.units), pytest.approx(packed.units.fill))
    random = llmtune.stats(keys, group_by_length=False)
    assert random.padded.fill == pytest.approx(1 - llmtune.plan(keys, group_by_length=False).data.batches.padding)
    lengths = llmtune.stats(keys, packing=True, neat_packing=False)
    assert lengths.packed.rows == math.ceil(lengths.trained.tokens / 128)


def test_numbers_for_machines_and_a_plot(keys: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = llmtune.stats(keys, val_size=4)
    numbers = json.loads(json.dumps(found.as_dict()))
    assert numbers["all"]["samples"] == 24 and numbers["evaluated"]["samples"] == 4
    assert "lengths" not in numbers
    found.plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert found._repr_html_().startswith("<pre")
