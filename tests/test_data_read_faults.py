"""Files that cannot be read as they are: one sentence says which, where, and how to mend it; other rows are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from llmtune.contract.errors import DataError
from llmtune.data import Row, Source, chunks, find

LINES = "".join(json.dumps({"a": f"{number:x}" * 40, "n": number}) + "\n" for number in range(2000)).encode()


def read(path: Path) -> list[Row]:
    return [row for chunk in chunks(find(Source(path=str(path)), Path("/"))) for row in chunk.rows()]


def parquet_bytes(path: Path) -> bytearray:
    rows = [json.loads(line) for line in LINES.splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="snappy")
    return bytearray(path.read_bytes())


ZIP = b"PK\x03\x04\x14\x00\x06\x00" + bytes(range(200))
WHOLE = {
    "gzip under a plain name": ("a.jsonl", gzip.compress(LINES), r"is compressed \(\.gz\); rename it to a\.jsonl\.gz"),
    "plain under gzip's name": (
        "a.jsonl.gz",
        LINES,
        r"is not compressed, though it ends in \.gz; rename it to a\.json",
    ),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(LINES)[:-50], "the compressed data end early or are damaged"),
    "zstd cut off": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "the compressed data end early or are damaged"),
    "zip": ("a.jsonl", ZIP, "is a zip archive, not what its ending says; unpack it"),
    "parquet under another name": ("a.jsonl", b"PAR1" + ZIP, r"is a Parquet file.*rename it to end in \.parquet"),
    "LFS pointer": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
    "UTF-16 without a mark": ("a.jsonl", '{"a": "text"}\n'.encode("utf-16-le"), "is UTF-16LE, allowed is UTF-8"),
    "UTF-32": ("a.csv", "a,b\n1,2\n".encode("utf-32"), "is UTF-32, allowed is UTF-8"),
    "arrow cut off": ("a.arrow", b"ARROW1\0\0" + bytes(40), "not an Arrow file, or a damaged one"),
    "header with an open quote": ("a.csv", b'a,"b\n1,2\n', r"a\.csv:1: not CSV .*; is a quote not closed"),
    "open quote": ("a.csv", b'a,b\n1,2\n1,"2\n3,4\n', r"a\.csv:3: not CSV .*; is a quote not closed"),
    "column twice": ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: column names are empty or come twice \(a, a\)"),
    "bars": ("a.csv", b"a|b\n1|2\n", r"a\.csv:1: columns seem to be separated by '\|', allowed are commas, semicolons"),
    "two separators": ("a.csv", b"a,b;c\n1,2;3\n", r"a\.csv:1: commas and semicolons may separate these columns"),
    "bad value in an array": ("a.json", b'[{"a": 1},\n{"a": tru}]', r"a\.json:2:7: not JSON: .*\{\"a\": >>>tru\}\]"),
    "array nested too deeply": ("a.json", b'[1,\n{"a":' + b"[" * 200_000, r"a\.json:2: a row is nested too deeply"),
}


@pytest.mark.parametrize("fault", WHOLE)
def test_a_file_that_cannot_be_read(fault: str, tmp_path: Path) -> None:
    name, content, message = WHOLE[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}:")


@pytest.mark.parametrize("compress", [False, True])
def test_damage_in_the_middle_is_told(compress: bool, tmp_path: Path) -> None:
    content = bytearray(gzip.compress(LINES)) if compress else parquet_bytes(tmp_path / "whole.parquet")
    path = tmp_path / ("a.jsonl.gz" if compress else "a.parquet")
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(byte ^ 0xFF for byte in content[middle : middle + 400])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.(jsonl\.gz|parquet): .*damaged.*; copy it again"):
        read(path)


LINE = {
    "half a character": (rb'{"a": "x \ud83d"}', r"a\.jsonl:2:10: half of a surrogate pair.*Found .*x >>>\\ud83d"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:2:1: holds a number of more than 4,300 digits"),
    "nested too deeply": (b"[" * 200_000, r"a\.jsonl:2:1: is nested too deeply"),
    "carriage returns": (b'{"a": 1}\r{"a": 2}', r"a\.jsonl:2:10: not JSON: lines end in a carriage return alone"),
    "python": (b"{'a': 1}", r"a\.jsonl:2:2: not JSON: Expecting property name"),
    "zeros": (bytes(100), r"a\.jsonl:2:1: not JSON"),
}


@pytest.mark.parametrize("fault", LINE)
def test_a_line_that_cannot_be_read_leaves_the_others(fault: str, tmp_path: Path) -> None:
    import re

    line, message = LINE[fault]
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n')
    first, bad, last = read(tmp_path / "a.jsonl")
    assert (first.data, last.data) == ({"a": 1}, {"a": "\U0001f600"})
    assert bad.data is None and re.search(message, bad.problem or "")


def test_half_a_character_in_an_array_leaves_the_other_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": "\\ude00"}, {"a": 2}]')
    first, bad, last = read(tmp_path / "a.json")
    assert (first.data, last.data) == ({"a": 1}, {"a": 2})
    assert (bad.problem or "").startswith(f"{tmp_path}/a.json:row 2:8: half of a surrogate pair")


def test_an_unended_last_line_is_cut_off_only_if_something_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for last, cut in ((b'{"a": tru}', False), (b'{"a": tr', True), ('{"a": "caf\u00e9'.encode()[:-1], True)):
        path.write_bytes(b'{"a": 1}\n' + last)
        problem = read(path)[1].problem or ""
        assert ("the last line is cut off" in problem) is cut and problem.startswith(f"{path}:2:")


def test_rows_of_csv_with_too_many_or_too_few_values_leave_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1\n1,2\n1,2,3\n1,caf\xe9\n3,4\n")
    few, good, many, byte, last = read(tmp_path / "a.csv")
    assert (good.data, last.data) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert few.problem == f"{tmp_path}/a.csv:2: has 1 values, the first line names 2 columns (a, b)"
    assert (many.problem or "").startswith(f"{tmp_path}/a.csv:4: has 3 values")
    assert f'{tmp_path}/a.csv:5: byte 0xe9 in the column "b" is not UTF-8' in (byte.problem or "")


def test_bytes_of_a_table_that_are_no_text_leave_the_other_rows(tmp_path: Path) -> None:
    texts = pyarrow.array([b"ok", b"caf\xe9", b"end"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet")
    assert (first.data, last.data) == ({"text": "ok"}, {"text": "end"})
    assert f"{tmp_path}/a.parquet:row 2: byte 0xe9 of a text is not UTF-8" in (bad.problem or "")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.data.reading import lines

    monkeypatch.setattr(lines, "LONGEST_LINE_BYTES", 5 * 2**20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 9 * 2**20)
    with pytest.raises(DataError, match=r"a\.jsonl:2: longer than 5 MiB; is it one row a line\?"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b" \r\n", gzip.compress(b"", mtime=0)])
def test_empty_files_hold_no_rows(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("a.json.gz" if content[:1] == b"\x1f" else "a.json")
    path.write_bytes(content)
    assert read(path) == []
