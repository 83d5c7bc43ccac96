"""An epoch is every token once, for every kind of batch and any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtune.contract.stages import Batch
from llmtune.data import DataConfig, TokenSamples, concatenate
from llmtune.data.batch_loader import BatchLoader, evaluation_batches
from llmtune.distributed.ranks import Ranks

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "grouped": {"group_by_length": True},
    "flat": {"flat": True},
    "packed": {"packing": True},
    "joined": {"packing": True, "neat_packing": False},
    "joined-flat": {"packing": True, "neat_packing": False, "flat": True},
}


def text(count: int = 41, seed: int = 0, **more: Any) -> TokenSamples:
    """Samples whose ids are all different, from 1 on; every token after the first is trained."""
    lengths = np.random.default_rng(seed).integers(2, 30, count * more.get("width", 1))
    stops = 1 + np.cumsum(lengths)
    pairs = [(np.arange(stop - n, stop), np.ones(n, bool)) for stop, n in zip(stops, lengths, strict=True)]
    return TokenSamples.from_lists(pairs, range(count), **more)


def feed_of(samples: TokenSamples, ranks: int = 1, **keys: Any) -> BatchLoader:
    shape: dict[str, Any] = {"per_device": 2, "micro_steps": 3, "flat": False, "reads": 1}
    shape |= {key: keys.pop(key) for key in shape if key in keys}
    config = DataConfig(**{"cutoff_len": 32, "group_by_length": False, **keys})
    return BatchLoader.make(samples, config, ranks=Ranks(size=ranks), seed=5, pad_id=0, **shape)


def on_all_ranks(feed: BatchLoader, step: int) -> Iterator[Batch]:
    for rank in range(feed.ranks.size):
        micros = replace(feed, ranks=replace(feed.ranks, rank=rank)).step(step, CPU)
        assert len(micros) == feed.micro_steps, "every rank takes part in every micro-step"
        yield from micros


def tokens_of(batch: Batch) -> list[int]:
    if not batch.sequences:
        return []
    kept = batch.input_ids if batch.attention_mask is None else batch.input_ids[batch.attention_mask == 1]
    return kept.reshape(-1).tolist()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_epoch_is_every_token_once(kind: str, ranks: int) -> None:
    """Ranks drop nothing and cannot drift apart; `num_train_epochs` counts what it says."""
    samples = text()
    feed = feed_of(samples, ranks, **KINDS[kind])
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for step in range(feed.order.steps_per_epoch):
            batches = list(on_all_ranks(feed, epoch * feed.order.steps_per_epoch + step))
            found = [token for batch in batches for token in tokens_of(batch)]
            assert len(found) == feed.tokens(epoch * feed.order.steps_per_epoch + step)
            seen.update(found)
        assert seen == Counter(samples.ids.tolist())


@pytest.mark.parametrize("kind", list(KINDS))
def test_positions_count_from_zero_within_what_a_token_sees(kind: str) -> None:
    feed = feed_of(text(), **KINDS[kind])
    for step in range(feed.order.steps_per_epoch):
        for batch in feed.step(step, CPU):
            assert (batch.position_ids is not None) == (batch.document_starts is not None)
            if batch.position_ids is None:  # a model counts a padded row's tokens from 0; padding is on the right
                continue
            lengths = batch.document_starts.diff().tolist()
            assert batch.position_ids.tolist() == [[at for length in lengths for at in range(length)]]


@pytest.mark.parametrize("kind", list(KINDS))
def test_data_smaller_than_a_step_make_one_step_an_epoch(kind: str) -> None:
    feed = feed_of(text(3), ranks=2, per_device=8, **KINDS[kind])
    assert feed.order.steps_per_epoch == 1
    for step in range(3):
        assert sorted(t for batch in on_all_ranks(feed, step) for t in tokens_of(batch)) == text(3).ids.tolist()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_has_the_same_tokens_on_any_number_of_ranks(kind: str) -> None:
    """A run continues with the rows it began with: nothing but the number of the step is its place in the data."""
    one = feed_of(text(), **KINDS[kind])
    two = feed_of(text(), ranks=4, **KINDS[kind]).with_rows(one.order.batch, 1)
    for step in (7, 0, 3):
        alone = sorted(token for batch in on_all_ranks(one, step) for token in tokens_of(batch))
        assert alone == sorted(token for batch in on_all_ranks(two, step) for token in tokens_of(batch))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_part_of_a_step_has_the_same_tokens_however_it_is_split(kind: str) -> None:
    """Updates of a stage that rolls out learn from one part each."""
    shapes = [(1, 2, 6), (3, 2, 2), (2, 6, 1), (4, 1, 3)]  # ranks, units of a micro-batch, micro-batches of a part
    found = []
    for ranks, per_device, micros in shapes:
        feed = feed_of(text(97), ranks, per_device=per_device, micro_steps=3 * micros, reads=3, **KINDS[kind])
        every = [replace(feed, ranks=replace(feed.ranks, rank=rank)).step(1, CPU) for rank in range(ranks)]
        found.append([
            sorted(t for own in every for batch in own[micros * part : micros * (part + 1)] for t in tokens_of(batch))
            for part in range(3)
        ])  # fmt: skip
    assert all(found[0]) and found[0][0] != found[0][1]
    assert all(other == found[0] for other in found[1:])


def test_every_part_of_a_step_keeps_units_where_data_are_few() -> None:
    feed = feed_of(text(7), per_device=4, micro_steps=9, reads=3).with_rows(36, 9)
    assert feed.micro_steps == 6
    assert all(batch.sequences for batch in feed.step(0, CPU))


def test_a_kernel_that_needs_no_padding_changes_no_step() -> None:
    padded, flat = (feed_of(text(), group_by_length=True, flat=flat) for flat in (False, True))
    steps = [[sorted(feed.order.step_units(step)) for step in range(14)] for feed in (padded, flat)]
    assert steps[0] == steps[1] != [sorted(feed_of(text()).order.step_units(step)) for step in range(14)]


def test_joined_rows_see_what_stands_before_them() -> None:
    samples = text()
    for flat in (False, True):
        feed = feed_of(
            samples, packing=True, neat_packing=False, flat=flat, micro_steps=1, disable_shuffling=True, per_device=4
        )
        batch = feed.step(0, CPU)[0]
        rows = batch.input_ids.reshape(4, 32)
        assert rows.reshape(-1).tolist() == list(range(1, 129)), "documents end to end"
        assert batch.attention_mask is None
        if flat:
            assert batch.document_starts.tolist() == [0, 32, 64, 96, 128], "a row is one document"
        # As run_clm has it: every token but a row's first is predicted, a document's first from the end of another.
        assert torch.equal(batch.labels.reshape(4, 32)[:, 1:], rows[:, 1:]) and batch.weight == 4 * 31


def test_only_answers_stay_trained_where_rows_are_joined() -> None:
    pairs = [(np.arange(10 * n + 1, 10 * n + 11), np.arange(10) >= 6) for n in range(8)]
    weights = np.tile(np.array([1, 1, 1, 1, 1, 1, 0.5, 0.5, 2, 2], np.float32), 8)
    samples = TokenSamples.from_lists(pairs, range(8), weights=weights)
    feed = feed_of(
        samples, packing=True, neat_packing=False, cutoff_len=32, per_device=3, micro_steps=1, disable_shuffling=True
    )
    (batch,) = feed.step(0, CPU)
    trained = [token for number in range(8) for token in range(10 * number + 7, 10 * number + 11)]
    expected = [token for token in trained if token not in (33, 65)]  # a row's first token has nothing before it
    assert sorted(batch.targets.tolist()) == expected
    assert {w: len(at) for w, at in batch.weight_groups} == {0.5: 16, 2.0: 16}


def test_pairs_are_never_separated() -> None:
    samples = text(30, width=2, kind="preference")
    for kind in ("padded", "grouped", "flat", "packed"):
        feed = feed_of(samples, ranks=2, cutoff_len=64, **KINDS[kind])
        for step in range(feed.order.steps_per_epoch):
            for batch in on_all_ranks(feed, step):
                assert batch.sequences == 2 * len(batch.sample_ids) == 2 * batch.weight
                for place, sample in enumerate(batch.sample_ids):
                    for half, part in enumerate(samples.sequences(sample)):
                        targets = batch.targets[batch.target_sequence == 2 * place + half]
                        assert targets.tolist() == samples.ids[part][1:].tolist()


def test_labels_follow_their_answers() -> None:
    samples = text(30, kind="labelled", labels=np.arange(30) % 3 == 0)
    for kind in ("padded", "packed"):
        for batch in on_all_ranks(feed_of(samples, ranks=2, **KINDS[kind]), 1):
            if batch.sequences:
                assert batch.desirable.tolist() == [sample % 3 == 0 for sample in batch.sample_ids]


@pytest.mark.parametrize("chosen", [None, np.arange(3, 20)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_takes_each_sample_once(ranks: int, chosen: np.ndarray | None) -> None:
    samples, seen, counts = text(), [], set()
    for rank in range(ranks):
        batches = list(
            evaluation_batches(
                samples,
                per_device=4,
                ranks=Ranks(rank=rank, size=ranks),
                flat=False,
                pad_id=0,
                device=CPU,
                chosen=chosen,
            )
        )
        counts.add(len(batches))
        seen += [sample for batch in batches for sample in batch.sample_ids]
    assert len(counts) == 1 and sorted(seen) == (list(range(41)) if chosen is None else chosen.tolist())


def test_tokens_mapped_read_only_are_only_read(tmp_path: Path) -> None:
    plain = text()
    weights = np.ones(len(plain.ids), np.float32)
    mapped = {}
    for name, array in {"ids": plain.ids, "mask": plain.mask, "weights": weights}.items():
        np.save(tmp_path / f"{name}.npy", array)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    samples = replace(plain, **mapped)
    for keys in KINDS.values():
        feed, expected = feed_of(samples, **keys), feed_of(plain, **keys)
        for step in range(feed.order.steps_per_epoch):
            for batch, other in zip(feed.step(step, CPU), expected.step(step, CPU), strict=True):
                assert torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.labels, other.labels)


def test_rows_of_nothing_but_prompts_are_left_out() -> None:
    """Prompts of 70 tokens and answers of 10, cut into rows of 16: most rows would be steps that learn nothing."""
    ids, mask = np.arange(80, dtype=np.int32), np.arange(80) >= 70
    samples = TokenSamples.from_lists([(ids, mask)] * 12, range(12))
    loader = feed_of(samples, packing=True, neat_packing=False, cutoff_len=16)
    every = replace(loader, units=concatenate(samples, 16, 5))
    weights = [every.batch([unit]).weight for unit in range(len(every.units))]
    assert loader.units.bare == weights.count(0) > 30
    assert [loader.batch([unit]).weight for unit in range(len(loader.units))] == [each for each in weights if each]
