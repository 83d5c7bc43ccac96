"""Which rows a streamed step has: a pure function of seed, epoch and place, whatever the ranks, and after a resume."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.data.mixing import draw
from llmtune.data.stream_loader import StreamLoader
from tests.streams import CPU, feed, on_ranks, origins, prepared, rows, run, targets, tokens, write

PACKINGS: dict[str, dict[str, Any]] = {
    "rows": {},
    "rows by length": {"group_by_length": True},
    "packs": {"packing": True},
    "end to end": {"packing": True, "neat_packing": False},
}


def numbers(found: list[list[str]]) -> list[int]:
    return [int(row.rpartition(":")[2].removeprefix("row ")) for step in found for row in step]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(48)))
    found, _ = run(made, range(36), batch=4)
    epochs = np.array(numbers(found)).reshape(3, 48)
    assert (np.sort(epochs) == np.arange(1, 49)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    # Blocks of 16 rows are shuffled each for itself.
    for epoch, values in enumerate(epochs):
        for block in range(3):
            order = np.random.default_rng([3, epoch, block]).permutation(16)
            mine = values[block * 16 : block * 16 + 16].reshape(4, 4)
            assert (np.sort(mine) == np.sort(1 + block * 16 + order.reshape(4, 4))).all()


def test_steps_straddle_epochs_that_the_batch_does_not_divide(tmp_path: Path) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(10)), disable_shuffling=True)
    found, _ = run(made, range(5), batch=4)
    assert sorted(numbers(found)) == sorted([*range(1, 11)] * 2)
    assert sorted(numbers(found[2:3])) == [1, 2, 9, 10]


def test_without_shuffling_rows_come_as_the_files_have_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / "set" / f"{name}.jsonl", rows(12))
    made = prepared(tmp_path / "set", disable_shuffling=True)
    found, _ = run(made, range(6), batch=4)
    assert [sorted(step) for step in found[:3]] == [
        sorted(f"a.jsonl:{number}" for number in range(at, at + 4)) for at in (1, 5, 9)
    ]
    assert sorted(found[3]) == sorted(f"b.jsonl:{number}" for number in range(1, 5))


@pytest.mark.parametrize("keys", PACKINGS.values(), ids=PACKINGS)
def test_ranks_share_the_same_steps(tmp_path: Path, keys: dict[str, Any]) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(60)), **keys)
    # A document that is cut in two may lie in two micro-batches, so there tokens are compared.
    look = targets if "neat_packing" in keys else origins
    alone, cursor = on_ranks(made, 1, range(9), batch=5, look=look)
    for ranks, micro_steps in ((2, 1), (3, 2), (7, 1)):  # of seven ranks two have no row
        found, own = on_ranks(made, ranks, range(9), batch=5, micro_steps=micro_steps, look=look)
        assert found == alone
        assert own == cursor


@pytest.mark.parametrize("keys", PACKINGS.values(), ids=PACKINGS)
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, keys: dict[str, Any]) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(41)), **keys)
    straight, _ = run(made, range(20), look=tokens)
    for stop in (1, 2, 5, 10, 13, 19):
        before, cursor = run(made, range(stop), look=tokens)
        after, _ = run(made, range(stop, 20), cursor, look=tokens)
        assert before + after == straight


@pytest.mark.parametrize("keys", PACKINGS.values(), ids=PACKINGS)
def test_a_run_goes_on_with_other_ranks(tmp_path: Path, keys: dict[str, Any]) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(41)), **keys)
    look = targets if "neat_packing" in keys else origins
    straight, _ = on_ranks(made, 1, range(15), batch=6, look=look)
    first, cursor = on_ranks(made, 2, range(4), batch=6, look=look)
    second, cursor = on_ranks(made, 3, range(4, 9), cursor, batch=6, look=look)
    third, _ = on_ranks(made, 1, range(9, 15), cursor, batch=6, look=look)
    assert first + second + third == straight


def files(folder: Path, kind: str) -> Path:
    """60 rows in two files of a kind."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for name, found in (("a", rows(25)), ("b", rows(35, 25))):
        if kind == "jsonl":
            write(folder / f"{name}.jsonl", [*found[:3], "", *found[3:]])
        elif kind == "jsonl.gz":
            plain = write(folder / "plain", found)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
        elif kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(found), folder / f"{name}.parquet", row_group_size=7)
        elif kind == "csv":
            lines = ["instruction,output", *(f"{row['instruction']},{row['output']}" for row in found)]
            (folder / f"{name}.csv").write_text("\n".join(lines), "utf-8")
        else:
            import json

            (folder / f"{name}.json").write_text(json.dumps(found), "utf-8")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv", "json"])
def test_every_kind_of_file_is_entered_in_its_middle(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    from llmtune.data.streaming import rows as stream_rows

    monkeypatch.setattr(stream_rows, "READ_ROWS", 8)
    made = prepared(files(tmp_path / "set", kind))
    straight, _ = run(made, range(20), look=tokens)
    assert len({str(step) for step in straight[:15]}) == 15
    for stop in (3, 7, 11, 16):
        _, cursor = run(made, range(stop), look=tokens)
        assert run(made, range(stop, 20), cursor, look=tokens)[0] == straight[stop:]


def test_a_resumed_stream_does_not_read_what_lies_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(1200))
    _, cursor = run(prepared(path), range(220))
    _, file, offset, before, used, taken = cursor["begin"]["mixed"]["readers"][0]
    # At most a chunk, a buffer and the rows that are read at a time are read once more.
    assert 880 - 4 * 64 - 16 <= taken == before + used and before == 512
    assert file == 0 and offset == sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:512])


def test_epochs_are_told_by_bytes_until_one_is_over(tmp_path: Path) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(5000)), buffer_size=500)
    with feed(made, batch=500) as one:
        found = []
        for step in range(25):
            one.step(step, CPU)
            found.append(one.epoch(step + 1))
    assert found[10:] == [round(step / 10, 4) for step in range(11, 26)]
    assert found[:10] == sorted(found[:10]) and 0.8 < found[9] < 1


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_data_sets_in_turn(tmp_path: Path, strategy: str) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", rows(count)) for name, count in (("a", 4), ("b", 10), ("c", 7))]
    made = prepared(sets, mix_strategy=strategy, disable_shuffling=True)
    expected, places = draw([4, 10, 7], over=strategy == "interleave_over", probabilities=None, seed=0)
    wanted = [f"{'abc'[number]}.jsonl:{place + 1}" for number, place in zip(expected, places, strict=True)]
    found, _ = run(made, range(2 * len(wanted) // 3), batch=3)
    assert [sorted(step) for step in found] == [
        sorted((wanted * 2)[at : at + 3]) for at in range(0, 2 * len(wanted), 3)
    ]


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_data_sets_by_probability(tmp_path: Path, strategy: str) -> None:
    """An epoch ends with the row that uses the first (or the last) data set up; then every one begins again."""
    sets = [write(tmp_path / f"{name}.jsonl", rows(count)) for name, count in (("a", 30), ("b", 40))]
    keys = {"mix_strategy": strategy, "interleave_probs": (0.7, 0.3), "disable_shuffling": True}
    made = prepared(sets, **keys)
    found, _ = run(made, range(200), batch=1)
    flat = [row for (row,) in found]
    last = "a.jsonl:30" if strategy == "interleave_under" else "b.jsonl:40"
    end = flat.index(last) + 1
    for name, count in (("a", 30), ("b", 40)):
        own = [int(row[8:]) for row in flat[:end] if row.startswith(name)]
        assert own == [place % count + 1 for place in range(len(own))]
        again = next(row for row in flat[end:] if row.startswith(name))
        assert again == f"{name}.jsonl:1"
    assert 0.55 < sum(row.startswith("a") for row in flat) / len(flat) < 0.85
    after, _ = run(made, range(137, 200), run(made, range(137), batch=1)[1], batch=1)
    assert after == found[137:]


def test_rows_of_similar_length_meet_in_a_step(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(1024))
    spread, seen = {}, {}
    for grouped in (False, True):
        made = prepared(path, group_by_length=grouped, buffer_size=512)
        with feed(made, batch=8) as one:
            lengths = [lengths_of(one, step) for step in range(128)]
        found, _ = run(made, range(128), batch=8)
        seen[grouped] = sorted(row for step in found for row in step)
        spread[grouped] = np.mean([max(step) - np.mean(step) for step in lengths])
        steps = np.mean(lengths, axis=1)
        assert np.abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.5  # no tide of short steps, then long ones
    assert seen[True] == seen[False] == sorted(f"a.jsonl:{number}" for number in range(1, 1025))
    assert spread[True] < 0.35 * spread[False]


def lengths_of(one: StreamLoader, step: int) -> list[int]:
    """Tokens of each row of a step."""
    (batch,) = one.step(step, CPU)
    mask = batch.attention_mask
    return [batch.input_ids.shape[1]] * 8 if mask is None else mask.sum(1).tolist()


def test_limits_and_rows_that_are_held_out(tmp_path: Path) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", rows(20)) for name in "ab"]
    made = prepared(sets, max_samples=12, val_size=5, mix_strategy="interleave_under")
    held = {Path(made.evaluation.origin(at)).name for at in range(len(made.evaluation))}
    assert held == {f"a.jsonl:{n}" for n in (1, 2, 3)} | {f"b.jsonl:{n}" for n in (1, 2)}
    found, _ = run(made, range(20), batch=3)
    seen = {row for step in found for row in step}
    assert not seen & held
    assert {int(row[8:]) for row in seen if row.startswith("a")} == {*range(4, 13)}
    assert {int(row[8:]) for row in seen if row.startswith("b")} == {*range(3, 13)} - {12}


def test_rows_of_several_samples_give_one_a_step(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "word " * (20 + 90 * (number % 3))} for number in range(9)])
    made = prepared(path, cutoff_len=40, disable_shuffling=True)
    found, _ = run(made, range(12), batch=1)
    flat = [row for (row,) in found]
    assert flat == sorted(flat) and flat.count("t.jsonl:2") > 1
    assert set(flat) == {f"t.jsonl:{number}" for number in range(1, 4)}
