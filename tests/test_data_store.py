"""Tokenised data on disk: what is read back is what was written, made once however many want it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune.contract.errors import DataError
from llmtune.data import hashes
from llmtune.data.cache import Place, key_of
from llmtune.data.piece import Packed, Piece
from llmtune.data.report import Bad, Losses, SourceReport
from llmtune.data.sequence import TokenSequence
from llmtune.data.store import StoreWriter, open_store
from llmtune.data.workers import in_order


def piece(seed: int, samples: int = 5, width: int = 1, weighted: bool = False, labelled: bool = False) -> Packed:
    rng = np.random.default_rng(seed)
    made = Piece(origin=f"file{seed}.jsonl:", width=width, read=samples + 1)
    for _ in range(samples * width):
        length = int(rng.integers(2, 9))
        weights = rng.choice([0.5, 1, 2], length).astype(np.float32) if weighted else None
        made.sequences.append(TokenSequence(rng.integers(0, 99, length, np.int32), rng.random(length) < 0.7, weights))
    made.rows, made.numbers = list(range(samples)), [10 * seed + at for at in range(samples)]
    made.labels = [bool(at % 2) for at in range(samples)] if labelled else []
    made.bad = [Bad(f"file{seed}.jsonl:7", "null content", "message 1", {"a": seed})]
    made.losses, made.ends = Losses(truncated=seed), Counter({3: seed})
    return made.packed()


def written(folder: Path, pieces: list[Packed]) -> Any:
    folder.mkdir()
    writer = StoreWriter(folder=folder, facts={"a": 1})
    for number, each in enumerate(pieces):
        writer.add(each, number)
    report = SourceReport(name="x", format="openai", why="messages", rows=9, bad=Counter({"null content": 2}))
    writer.finish([report], ["one", "two"])
    return open_store(folder)


@pytest.mark.parametrize("kind", [{}, {"width": 2}, {"labelled": True}, {"weighted": True}])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, kind: dict[str, Any]) -> None:
    pieces = [piece(1, **kind), piece(2, samples=0), piece(3, **kind)]
    found = written(tmp_path / "store", pieces)
    samples = found.samples
    assert isinstance(samples.ids, np.memmap) and not samples.ids.flags.writeable
    assert len(samples) == 10 and samples.width == kind.get("width", 1)
    for name in ("ids", "mask", "trained"):
        assert getattr(samples, name).tolist() == np.concatenate([getattr(each, name) for each in pieces]).tolist()
    assert (samples.stops - samples.starts).tolist() == np.concatenate([each.lengths for each in pieces]).tolist()
    assert not samples.mask[samples.starts].any()
    assert [samples.origin(at) for at in (0, 4, 5, 9)] == [
        f"file{n}.jsonl:{m}" for n, m in ((1, 10), (1, 14), (3, 30), (3, 34))
    ]
    assert samples.sets is not None and samples.sets.tolist() == [0] * 5 + [2] * 5
    assert (samples.weights is not None) == ("weighted" in kind) and (samples.labels is not None) == (
        "labelled" in kind
    )
    assert (found.losses.truncated, found.ends, found.sources[0].bad) == (
        6,
        Counter({3: 6}),
        Counter({"null content": 2}),
    )
    bad = [json.loads(line) for line in found.bad_rows.read_text("utf-8").splitlines()]
    assert [row["row"] for row in bad] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_pieces_before_the_first_weighted_one_count_1(tmp_path: Path) -> None:
    first, second, third = piece(1), piece(2, weighted=True), piece(3)
    weights = written(tmp_path / "store", [first, second, third]).samples.weights
    size = len(first.ids)
    assert (weights[:size] == 1).all() and (weights[-len(third.ids) :] == 1).all()
    assert weights[size : size + len(second.ids)].tolist() == second.weights.tolist()


def test_the_digest_tells_contents_apart_and_names_a_part(tmp_path: Path) -> None:
    one, again, other = (
        written(tmp_path / name, [piece(seed)]).samples for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one.digest == again.digest != other.digest
    assert one.select([0, 2]).digest == again.select([0, 2]).digest not in (one.digest, one.select([0, 1]).digest)
    part = one.select([3, 1, 3])
    assert part.ids is one.ids and [part.sample(at)[0].tolist() for at in range(3)] == [
        one.sample(at)[0].tolist() for at in (3, 1, 3)
    ]


def square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number**2, os.getpid()


def test_workers_give_results_in_order_from_other_processes() -> None:
    found = list(in_order(square, iter(range(40)), 3))
    assert [result for result, _ in found] == [number**2 for number in range(40)]
    assert os.getpid() not in {pid for _, pid in found} and len({pid for _, pid in found}) > 1
    assert {pid for _, pid in in_order(square, iter(range(2)))} == {os.getpid()}


def fails(number: int) -> int:
    if number == 5:
        raise DataError("five")
    return number


def dies(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_goes_wrong_in_a_worker_is_said_here() -> None:
    with pytest.raises(DataError, match="^five$"):
        list(in_order(fails, iter(range(20)), 2))
    with pytest.raises(DataError, match="preprocessing_num_workers: a process that prepares data died"):
        list(in_order(dies, iter(range(20)), 2))


def place(folder: Path, **keys: Any) -> Place:
    return Place(**{"folder": folder, "facts": {"a": 1}, "chosen": False, "shared": False, "overwrite": False, **keys})


class Make:
    """Makes a store, slowly, and leaves a line for each time."""

    def __init__(self, log: Path, seed: int = 1, error: str = "") -> None:
        self.log, self.seed, self.error = log, seed, error

    def __call__(self, writer: StoreWriter) -> None:
        with self.log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        if self.error:
            raise DataError(self.error)
        writer.add(piece(self.seed), 0)
        writer.finish([SourceReport(name="x")], ["x"])

    @property
    def times(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def get(folder: Path, log: Path, keys: dict[str, Any], error: str, results: Any) -> None:
    os.environ |= {"WORLD_SIZE": "3", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "run"}
    try:
        results.put(place(folder, **keys).get(Make(log, error=error)).samples.digest)
    except DataError as refusal:
        results.put(f"refused: {refusal}")


@pytest.mark.parametrize("keys", [{}, {"shared": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("error", ["", "row 3 is bad"])
def test_ranks_that_want_the_same_data_make_it_once(tmp_path: Path, keys: dict[str, Any], error: str) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    log, folder = tmp_path / "log", tmp_path / "data" / "key"
    ranks = [context.Process(target=get, args=(folder, log, keys, error, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(found) == 1 and found == ({f"refused: {error}"} if error else found)
    assert Make(log).times == 1
    assert [path for path in folder.parent.iterdir() if path.suffix == ".tmp"] == []


def test_a_store_is_used_again_until_it_should_be_overwritten(tmp_path: Path) -> None:
    make, folder = Make(tmp_path / "log"), tmp_path / "key"
    first = place(folder).get(make)
    assert place(folder).get(make).samples.digest == first.samples.digest and make.times == 1
    again = place(folder, overwrite=True).get(Make(tmp_path / "log", seed=2))
    assert again.samples.digest != first.samples.digest and make.times == 2
    assert first.samples.ids.tolist() == piece(1).ids.tolist()  # who has it open keeps it


def test_what_an_interrupted_process_left_is_neither_used_nor_kept(tmp_path: Path) -> None:
    left = tmp_path / ".key.123.tmp"
    left.mkdir()
    (left / "ids.bin").write_bytes(b"half")
    assert len(place(tmp_path / "key").get(Make(tmp_path / "log")).samples) == 5
    assert not left.exists()


def test_a_folder_of_ones_own_choice_is_not_taken_for_other_data(tmp_path: Path) -> None:
    make = Make(tmp_path / "log")
    place(tmp_path / "key", chosen=True, facts={"a": 1, "template": "x"}).get(make)
    with pytest.raises(DataError, match=r"tokenized_path: .*tokenised otherwise \(other template\); name another"):
        place(tmp_path / "key", chosen=True, facts={"a": 1, "template": "y"}).get(make)
    place(tmp_path / "key", chosen=True, facts={"a": 1, "template": "y"}, overwrite=True).get(make)
    assert make.times == 2
    place(tmp_path / "key", chosen=True, facts={"a": 1, "template": "y", "llmtune_code": "later"}).get(make)
    assert make.times == 2


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    place(tmp_path / "key").get(Make(tmp_path / "log"))
    file = tmp_path / "key" / "ids.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"key: damaged \(.*ids.bin has .* bytes, .* were written\); delete the folder"):
        place(tmp_path / "key").get(Make(tmp_path / "log"))


@pytest.mark.parametrize("name", ["ids.bin", "numbers.bin"])
def test_a_store_that_was_changed_is_named(tmp_path: Path, name: str) -> None:
    place(tmp_path / "key").get(Make(tmp_path / "log"))
    file = tmp_path / "key" / name
    before, content = file.stat(), bytearray(file.read_bytes())
    place(tmp_path / "key").get(Make(tmp_path / "log"))
    content[9] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=rf"key: damaged \(.*{name} is not as it was written\); delete the folder"):
        place(tmp_path / "key").get(Make(tmp_path / "log"))
    assert place(tmp_path / "key", overwrite=True).get(Make(tmp_path / "log")).samples


def test_a_store_that_stays_as_it_is_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path / "key").get(Make(tmp_path / "log"))
    monkeypatch.setattr(hashes, "_SETTLED_S", -1.0)
    place(tmp_path / "key").get(Make(tmp_path / "log"))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))
    place(tmp_path / "key").get(Make(tmp_path / "log"))


@pytest.mark.parametrize("about", [None, "{}", "[]", "not JSON", '{"facts": {"a": 1}}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_files_of_others_is_never_replaced(tmp_path: Path, about: str | None, overwrite: bool) -> None:
    folder = tmp_path / "key"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    if about is not None:
        (folder / "about.json").write_text(about)
    with pytest.raises(DataError, match=r"tokenized_path: .*key holds .*mine\.txt, which llmtune did not write, so it"):
        place(folder, chosen=True, overwrite=overwrite).get(Make(tmp_path / "log"))
    assert (folder / "mine.txt").read_text() == "mine" and not (tmp_path / "log").exists()


def test_a_file_beside_the_tokens_is_not_deleted_with_them(tmp_path: Path) -> None:
    folder, make = tmp_path / "key", Make(tmp_path / "log")
    place(folder, chosen=True).get(make)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds mine\.txt, which llmtune did not write"):
        place(folder, chosen=True, overwrite=True).get(make)
    place(folder, chosen=True).get(make)  # they can still be read
    assert make.times == 1 and (folder / "mine.txt").exists()


def test_hidden_folders_of_others_beside_a_store_stay(tmp_path: Path) -> None:
    others = [tmp_path / ".key.mine.tmp", tmp_path / ".key.1", tmp_path / ".key.1.tmpx"]
    for other in others:
        other.mkdir()
    place(tmp_path / "key", chosen=True).get(Make(tmp_path / "log"))
    assert all(other.is_dir() for other in others)


def test_what_the_cache_holds_is_copied_and_not_made_again(tmp_path: Path) -> None:
    make = Make(tmp_path / "log")
    cached = place(tmp_path / "cache" / "key")
    first = cached.get(make)
    own = place(tmp_path / "mine" / "dataset", chosen=True, copy_of=cached)
    assert own.get(make).samples.digest == first.samples.digest and make.times == 1
    assert (tmp_path / "mine" / "dataset" / "ids.bin").is_file()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"tokenised data cannot be written \(.*\); set LLMTUNE_CACHE to a folder"):
        place(tmp_path / "file" / "key", shared=True).get(Make(tmp_path / "log"))


def test_keys_follow_the_facts_and_not_their_order() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
