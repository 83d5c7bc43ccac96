"""What can go wrong with a stream, and what is said of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.contract.errors import DataError
from llmtune.contract.examples import Text
from llmtune.data.reading import Dataset
from llmtune.data.stream_loader import StreamLoader
from llmtune.data.streaming.chunks import PieceMaker
from llmtune.data.streaming.rows import Mixed, RowReader, ShuffledRows
from llmtune.data.units import make_units
from llmtune.data.workers import WorkerPool
from llmtune.distributed.ranks import Ranks
from tests.streams import CPU, feed, on_ranks, origins, prepared, rows, run, tokens, write

BAD = {"instruction": "Say nothing."}


def test_a_bad_row_stops_the_run_at_its_place(tmp_path: Path) -> None:
    """It lies behind the rows that are looked at beforehand, so only the step that needs it can tell."""
    path = write(tmp_path / "a.jsonl", [*rows(400), BAD, *rows(20)])
    made = prepared(path, disable_shuffling=True)
    with feed(made) as one:
        for step in range(64):
            origins(one, step)
        with pytest.raises(DataError, match=r'a\.jsonl:401: no output: alpaca needs the column "output"'):
            for step in range(64, 101):
                origins(one, step)


def test_bad_rows_that_are_skipped_are_counted_and_kept(tmp_path: Path) -> None:
    found = [*rows(310), BAD, "{broken", {"instruction": "Say it.", "output": "It."}, *rows(90)]
    made = prepared(write(tmp_path / "a.jsonl", found), on_bad_record="skip", disable_shuffling=True)
    with feed(made) as one:
        one.start(bad_rows=tmp_path / "quarantine.jsonl")
        seen = [row for step in range(100) for row in origins(one, step)]
        summary = one.summary()
    assert len(seen) == 400 and not {"a.jsonl:311", "a.jsonl:312"} & set(seen) and "a.jsonl:313" in seen
    kept = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {(Path(line["origin"]).name, line["reason"]) for line in kept} == {
        ("a.jsonl:311", "no output"), ("a.jsonl:312", "unreadable"),
    }  # fmt: skip
    assert "rows (" in summary and "no output 1" in summary and "unreadable 1" in summary


def test_a_continued_run_lists_and_counts_bad_rows_once(tmp_path: Path) -> None:
    """A run is ended between two checkpoints, after it wrote down rows that the continued one meets again."""
    found: list[Any] = rows(600)
    for number in (530, 390, 310):
        found.insert(number, BAD)
    made = prepared(write(tmp_path / "a.jsonl", found), on_bad_record="skip", disable_shuffling=True)
    path = tmp_path / "quarantine.jsonl"
    with feed(made) as one:
        one.start(bad_rows=path)
        for step in range(100):
            origins(one, step)
        cursor = json.loads(json.dumps(one.cursor()))
        for step in range(100, 145):
            origins(one, step)
        straight, text = one.summary(), path.read_text()
    assert len(text.splitlines()) == 3
    with feed(made) as one:
        one.start(100, cursor, path)
        for step in range(100, 145):
            origins(one, step)
        assert path.read_text() == text and one.summary() == straight


def test_bad_rows_of_all_ranks_and_before_a_resume_are_limited_together(tmp_path: Path) -> None:
    """Twelve bad rows are too many, though no rank and no part of the run meets more than ten."""
    found: list[Any] = rows(900)
    for number in range(310, 900, 50):
        found.insert(number, BAD)
    made = prepared(
        write(tmp_path / "a.jsonl", found), on_bad_record="skip", max_bad_records=10, disable_shuffling=True
    )
    _, cursor = run(made, range(120))
    assert 2 < sum(cursor["reports"][0]["bad"].values()) < 10
    with pytest.raises(DataError, match="more than max_bad_records=10"):
        run(made, range(120, 220), cursor)
    with pytest.raises(DataError, match="more than max_bad_records=10"):
        on_ranks(made, 3, range(220))


class Shaky:
    """A format that draws random numbers while it reads rows."""

    kind, columns, required = "text", ("instruction", "output"), ("instruction",)

    def __init__(self, _: object) -> None:
        pass

    def convert(self, row: dict[str, Any]) -> Text:
        return Text(text=f"{row['instruction']} {random.random()} {np.random.random()}")


def test_a_format_that_draws_random_numbers_goes_on_with_the_same(tmp_path: Path) -> None:
    made = prepared(write(tmp_path / "a.jsonl", rows(120)))
    chosen = [replace(each, format=Shaky(None)) for each in made.stream.maker.chosen]
    maker = PieceMaker(made.stream.config, made.stream.maker.tokeniser, chosen, made.stream.maker.kind)
    made = replace(made, stream=replace(made.stream, maker=maker))
    straight, _ = run(made, range(40), look=tokens)
    assert straight[0] != straight[30]
    _, cursor = run(made, range(17), look=tokens)
    assert run(made, range(17, 40), cursor, look=tokens)[0] == straight[17:]
    random.seed(5)
    assert run(made, range(3), look=tokens)[0] == straight[:3]


def test_more_bad_rows_than_the_recipe_lets_pass(tmp_path: Path) -> None:
    found = [row for row in rows(300)] + [BAD] * 20 + rows(100)
    made = prepared(write(tmp_path / "a.jsonl", found), on_bad_record="skip")
    with feed(made) as one, pytest.raises(DataError, match="more than max_bad_records=0.001 lets"):
        for step in range(105):
            origins(one, step)


def test_rows_without_a_trained_token_are_counted_and_no_unit(tmp_path: Path) -> None:
    """A prompt that fills cutoff_len leaves nothing to train on; the step goes on with the next row."""
    long = {"instruction": "word " * 200, "output": "No."}
    found = [row for number, row in enumerate(rows(600)) for row in ([row, long] if number > 300 else [row])]
    made = prepared(write(tmp_path / "a.jsonl", found))
    with feed(made) as one:
        for step in range(230):
            batches = one.step(step, CPU)
            assert all(len(batch.sample_ids) == 4 for batch in batches)
            assert all(batch.weight > 0 for batch in batches)
        told = one.summary()
    assert int(told.partition("dropped: ")[2].partition(" samples without a trained token")[0]) > 100


def test_a_stream_that_gives_no_sample_any_more_ends(tmp_path: Path, monkeypatch: Any) -> None:
    from llmtune.data import stream_loader

    monkeypatch.setattr(stream_loader, "EMPTY_ROWS", 128)
    long = {"instruction": "word " * 100, "output": "No."}
    made = prepared(write(tmp_path / "a.jsonl", [*rows(300), *[long] * 1500]), disable_shuffling=True)
    with feed(made) as one, pytest.raises(DataError, match=r"\d+ rows in a row gave no sample"):
        for step in range(200):
            origins(one, step)


def test_an_end_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(300))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl:300:\d+: the last line is cut off"):
        run(prepared(path), range(75))


def test_a_damaged_file_stops_the_run_when_it_is_reached(tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "set"
    write(folder / "a.jsonl", rows(6000))
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows(3000)).encode())
    (folder / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    made = prepared(folder, disable_shuffling=True)
    with feed(made, batch=50) as one:
        for step in range(64):
            origins(one, step)
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: the compressed data end early"):
            for step in range(64, 160):
                origins(one, step)


@pytest.mark.parametrize(
    ("found", "keys", "message"),
    [
        ([], {}, "0 records; the file is empty"),
        (["{", "{"], {}, "cannot use 2 of 2 rows"),
        (rows(5), {"val_size": 5}, "5 records, and val_size holds 5; nothing is left"),
        (rows(5), {"val_size": 0.1}, "val_size: found 0.1, a share of a stream"),
        (rows(5), {"tokenized_path": "here"}, "tokenized_path: streaming keeps no tokens"),
        ([{"instruction": "word " * 200, "output": "No."}], {}, "have no token to train on"),
        ([*rows(3), BAD], {}, r"a.jsonl:4: no output"),
    ],
)
def test_what_is_refused_before_the_run(tmp_path: Path, found: list, keys: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", found)
    with pytest.raises(DataError, match=message):
        prepared(path, **keys)


def test_fewer_rows_than_a_step(tmp_path: Path) -> None:
    message = "streaming: the data have 3 rows, fewer than the 4 of a step"
    made = prepared(write(tmp_path / "a.jsonl", rows(3)))
    with pytest.raises(DataError, match=message), feed(made) as one:
        origins(one, 0)
    sets = [write(tmp_path / f"{name}.jsonl", rows(1)) for name in "abc"]
    made = prepared(sets, mix_strategy="interleave_under")  # whose size is not counted beforehand
    with feed(made) as one, pytest.raises(DataError, match=message):
        origins(one, 0)


def test_a_step_that_would_fill_the_memory(tmp_path: Path) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", rows(9)) for name in "ab"]
    made = prepared(sets, mix_strategy="interleave_under")  # of unknown size
    with pytest.raises(DataError, match=r"gradient_accumulation_steps: found 100,000,000, .*allowed are 268,435,456"):
        StreamLoader.over(made.stream, made.train, per_device=1, micro_steps=10**8, ranks=Ranks(), flat=False, pad_id=0)


def test_packed_rows_that_train_nothing_are_counted_once(tmp_path: Path) -> None:
    """Samples that train at their beginning, before samples that train at their end: the row between them is bare."""
    ids = list(range(5, 24))
    ends = [[*ids[:3], *[-100] * 16], [*[-100] * 16, *ids[16:]]]
    found = [{"input_ids": ids, "labels": ends[number % 2]} for number in range(40)]
    keys = {"cutoff_len": 20, "packing": True, "neat_packing": False, "disable_shuffling": True}
    made = prepared(write(tmp_path / "a.jsonl", found), **keys)
    units = make_units(made.train, made.stream.config, 3)
    told = f"neat_packing: {units.bare} rows left out, as no token in them trains"
    with feed(made) as one:
        origins(one, 0)
        assert units.bare > 4 and told in one.summary()
        cursor = json.loads(json.dumps(one.cursor()))
    with feed(made) as one:
        one.start(1, cursor)
        for step in range(1, len(units) // 4):
            origins(one, step)
        assert told in one.summary()


class Untold(Exception):
    """An error that cannot travel between processes."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def _fail(item: Any) -> Any:
    if item == "untold":
        raise Untold("what it ", "says")
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "raise":
        raise DataError("as told")
    return os.getpid(), item


def test_processes_do_the_work_and_their_ends_are_noticed() -> None:
    pool = WorkerPool(_fail, 2)
    # Who stops a run tells every process of it; data are needed until the run has ended.
    for pid in {pid for pid, _ in pool.in_order(iter(range(6)))}:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    results = list(pool.in_order(iter(range(6))))
    assert [number for _, number in results] == [*range(6)] and os.getpid() not in {pid for pid, _ in results}
    with pytest.raises(DataError, match="as told"):
        list(pool.in_order(iter([1, "raise"])))
    with pytest.raises(RuntimeError, match="Untold: what it says"):
        list(pool.in_order(iter([1, "untold"])))
    assert [number for _, number in pool.in_order(iter([7]))] == [7]
    with pytest.raises(DataError, match="preprocessing_num_workers: a process that prepares data died"):
        list(pool.in_order(iter([1, "die"])))
    pool.close()


def test_no_process_outlives_the_one_it_works_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "from tests.test_stream_faults import _fail\n"
        "from llmtune.data.workers import WorkerPool\n"
        "pool = WorkerPool(_fail, 3)\n"
        "print(*{pid for pid, _ in pool.in_order(iter(range(30)))}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == 'kill' else None\n"
    )
    for how in ("kill", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, timeout=60,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        pids = [int(pid) for pid in done.stdout.split()]
        assert pids and done.returncode == (-signal.SIGKILL if how == "kill" else 0)
        deadline = 100
        while any(_alive(pid) for pid in pids) and deadline:
            deadline -= 1
            subprocess.run(["sleep", "0.05"])
        assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """128 MB are read through buffers of 4 MB."""
    path, line = tmp_path / "large.jsonl", json.dumps({"text": "word " * 1600}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(16):
            file.write(line * 1000)
    mixed = Mixed([RowReader(0, Dataset(spelling="large", name="large", files=(path,)))], "concat", None, 0)
    stream = ShuffledRows(mixed, buffer_size=512, seed=0, shuffle=True, least=8).runs(64)
    read = 0
    tracemalloc.start()
    try:
        while read < 16_000:
            read += len(next(stream).rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == 16_000
    assert path.stat().st_size > 120e6 and peak < 40e6


def test_a_hub_set_is_streamed_by_datasets(tmp_path: Path) -> None:
    """A folder stands in for the hub: the library reads both by the same call."""
    from llmtune.data.streaming.stream import describe

    write(tmp_path / "set" / "train.jsonl", rows(600))
    hub = Dataset(spelling="hub:some/set", name="set", hub=str(tmp_path / "set"))
    made = prepared(tmp_path / "set" / "train.jsonl")
    stream = replace(made.stream, datasets=[hub])
    made = replace(made, stream=stream)
    straight, _ = run(made, range(140))
    assert len({row for step in straight for row in step}) == 560
    before, cursor = run(made, range(90))
    after, _ = run(made, range(90, 140), cursor)
    assert before + after == straight
    assert describe(hub) == [str(tmp_path / "set"), None, "train", None]
