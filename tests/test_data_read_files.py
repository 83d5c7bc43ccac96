"""The same rows from every kind of file, whole or from any place on."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from llmtune.contract.errors import DataError
from llmtune.data import Row, Source, chunks, find, hashes
from llmtune.data.reading import Position, content_key, separated

ROWS = [{"instruction": f"say {number}", "output": "é\n" * number} for number in range(1, 24)]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def found_rows(path: Path, start: Position | None = None, rows: int = 1000) -> list[Row]:
    found = find(Source(path=str(path)), Path("/"))
    # Chunks travel to other processes before they are parsed.
    return [row for chunk in chunks(found, start, rows) for row in pickle.loads(pickle.dumps(chunk)).rows()]


def as_csv(rows: list[dict], path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def as_stream(rows: list[dict], path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def as_lines(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), "utf-8", newline="")


WRITE: dict[str, Callable[[list[dict], Path], Any]] = {
    "a.json": lambda rows, path: path.write_text(json.dumps(rows, indent=2), "utf-8"),
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "lines.json": as_lines,
    "array.jsonl": lambda rows, path: path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8"),
    "a.parquet": lambda rows, path: parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5),
    "a.feather": lambda rows, path: feather.write_feather(pyarrow.Table.from_pylist(rows), path),
    "a.arrow": as_stream,
    "a.csv": as_csv,
    "a.tsv": lambda rows, path: as_csv(rows, path, "\t"),
}


def packed(path: Path, ending: str) -> Path:
    """The file again, compressed."""
    new = path.with_name(path.name + ending)
    if ending == ".gz":
        new.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.output_stream(str(new), compression="zstd") as stream:
            stream.write(path.read_bytes())
    return new


@pytest.mark.parametrize("name", WRITE)
def test_every_kind_of_file_compressed_or_not_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITE[name](ROWS, tmp_path / name)
    for path in (tmp_path / name, packed(tmp_path / name, ".gz"), packed(tmp_path / name, ".zst")):
        assert [row.data for row in found_rows(path, rows=4)] == ROWS


@pytest.mark.parametrize("name", [*WRITE, "a.jsonl.gz"])
def test_reading_goes_on_from_any_place_with_chunks_of_another_size(name: str, tmp_path: Path) -> None:
    plain = name.removesuffix(".gz")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        WRITE[plain](ROWS, tmp_path / folder / plain)
        if name != plain:
            packed(tmp_path / folder / plain, ".gz")
            (tmp_path / folder / plain).unlink()
    found = find(Source(path=str(tmp_path)), Path("/"))
    all_rows = [(chunk.origin, row) for chunk in chunks(found) for row in chunk.rows()]
    read = 0
    for chunk in chunks(found, rows=5):
        read += len(list(chunk.rows()))
        start = Position(*json.loads(json.dumps(chunk.next)))
        for size in (3, 1000):
            rest = [(other.origin, row) for other in chunks(found, start, size) for row in other.rows()]
            assert rest == all_rows[read:]
    assert read == len(all_rows) == 2 * len(ROWS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"a": TEXTS, "b": TEXTS}), min_size=1, max_size=6))
def test_any_text_comes_back_from_every_kind_of_file(rows: list[dict], tmp_path: Path) -> None:
    for name, write in WRITE.items():
        write(rows, tmp_path / name)
        assert [row.data for row in found_rows(tmp_path / name)] == rows, name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    block=st.integers(1, 40),
)
def test_arrays_read_by_blocks_of_any_size_are_what_json_loads(rows: list[Any], block: int, tmp_path: Path) -> None:
    from llmtune.data.reading import arrays

    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=block % 3 or None), "utf-8")
    whole = arrays._BLOCK_BYTES
    arrays._BLOCK_BYTES = block
    try:
        assert [row.data for row in found_rows(path)] == rows
    finally:
        arrays._BLOCK_BYTES = whole


def test_numbers_of_arrays_are_those_that_json_reads(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 12345678901234567890123}, {"a": -Infinity}, {"a": NaN}]')
    large, infinite, nan = (row.data["a"] for row in found_rows(tmp_path / "a.json"))
    assert (large, infinite) == (12345678901234567890123, float("-inf")) and nan != nan


def test_a_text_file_gives_a_row_a_line_with_its_own_number(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one  \n\n  zwei é\r\nthree".encode())
    assert found_rows(tmp_path / "a.txt") == [
        Row({"text": "one  "}, 1), Row({"text": "  zwei é"}, 3), Row({"text": "three"}, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "question;answer\r\nWhat, now?;1,5\r\n", "semicolons"),
        ("a.csv", '\ufeff"question";"answer"\r\n"What, now?";"1,5"\r\n', "semicolons"),
        ("a.csv", "question\tanswer\nWhat, now?\t1,5\n", "tabs"),
        ("a.csv", 'question,answer\n"What, now?","1,5"\n', ""),
        ("a.csv", 'question,answer\n"What, now?","1,5"\n"a;b","c;\n;d"\n', ""),
        ("a.tsv", 'question,answer\n"What, now?","1,5"\n', "commas"),
    ],
)
def test_what_separates_columns_is_found_and_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert found_rows(tmp_path / name)[0].data == {"question": "What, now?", "answer": "1,5"}
    found = find(Source(path=name), tmp_path)
    assert separated(found) == (f"; columns are separated by {told}" if told else "")


def test_a_name_that_holds_another_separator_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b,c\n1,2\n3,4\n", "utf-8")
    assert [row.data for row in found_rows(tmp_path / "a.csv")] == [{"a;b": "1", "c": "2"}, {"a;b": "3", "c": "4"}]


def test_rows_of_csv_are_numbered_by_the_line_they_begin_in(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r\n\r\n007,\r\n')
    assert found_rows(tmp_path / "a.csv") == [Row({"a": "1", "b": "x\r\ny"}, 2), Row({"a": "007", "b": ""}, 5)]


def test_a_large_array_is_read_with_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    row = json.dumps({"text": "x" * 1000})
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join([row] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    try:
        count = sum(chunk.count for chunk in chunks(find(Source(path=str(path)), Path("/")), rows=100))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000 and peak < path.stat().st_size / 2


def test_a_long_line_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 10_000_000}) + '\n{"text": "y"}\n')  # over two blocks of 4 MiB
    assert [len(row.data["text"]) for row in found_rows(path)] == [10_000_000, 1]


def test_folders_of_the_datasets_library_are_read_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"a": name}, {"a": "x"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"the library's own")
    for source, first in (
        (Source(path="one"), "train"), (Source(path="both"), "train"), (Source(path="both", split="test"), "test"),
    ):  # fmt: skip
        rows = [row.data for chunk in chunks(find(source, tmp_path)) for row in chunk.rows()]
        assert rows == [{"a": first}, {"a": "x"}]
    with pytest.raises(DataError, match='no split "dev", allowed are train, test'):
        find(Source(path="both", split="dev"), tmp_path)


def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path: Path) -> None:
    for name in (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(DataError, match=r"several splits \(data/test-.*data/train-.*as in \./train\*"):
        find(Source(path="."), tmp_path)
    assert len(find(Source(path="data/train*"), tmp_path).files) == 2
    (tmp_path / "data/test-00000-of-00001.jsonl").rename(tmp_path / "data/trainers.jsonl")
    assert len(find(Source(path="data"), tmp_path).files) == 3


def test_hidden_folders_hold_no_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".cache/b.jsonl", ".c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in find(Source(path="."), tmp_path).files] == ["a.jsonl"]


def test_the_content_key_follows_the_content_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SETTLED_S", -1.0)

    def key(name: str) -> str:
        return content_key(find(Source(path=name), tmp_path))

    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"a": 1}\n')
    (tmp_path / "d.jsonl").write_text('{"a": 2}\n')
    old = (1_600_000_000, 1_600_000_000)
    os.utime(tmp_path / "a.jsonl", old)
    first = key("a.jsonl")
    assert key("b.jsonl") == first and len({first, key("c.txt"), key("d.jsonl"), key("*.jsonl")}) == 4
    assert any((tmp_path / "cache").rglob("*")), "the hash of a file that has settled is noted"
    real = Path.open

    def opened(self: Path, *args: Any, **keys: Any) -> Any:
        assert self != tmp_path / "a.jsonl", "a noted hash is not computed again"
        return real(self, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        assert key("a.jsonl") == first
    (tmp_path / "a.jsonl").write_text('{"a": 3}\n')
    os.utime(tmp_path / "a.jsonl", old)
    assert key("a.jsonl") != first, "neither size nor time of modification tells"
