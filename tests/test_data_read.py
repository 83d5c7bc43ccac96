"""Files become rows, each with its origin; what cannot be read says where, what and how to mend it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import llmtune
from llmtune.contract.errors import DataError
from llmtune.data import Row, Source, chunks, find

ROWS = [{"instruction": f"say {number}", "output": "é" * number} for number in range(1, 4)]


def rows_of(path: Path | str, base: Path = Path("/"), **keys: str) -> list[Row]:
    found = find(Source(path=str(path), **keys), base)
    return [row for chunk in chunks(found) for row in chunk.rows()]


def test_array_lines_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in ROWS), "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    origins = {}
    for name in ("a.json", "b.jsonl", "c.json", "d.parquet"):
        rows = rows_of(tmp_path / name)
        assert [row.data for row in rows] == ROWS
        (chunk,) = chunks(find(Source(path=name), tmp_path))
        origins[name] = f"{chunk.origin}{rows[1].number}"
    assert origins == {
        "a.json": f"{tmp_path}/a.json:row 2",
        "b.jsonl": f"{tmp_path}/b.jsonl:2",
        "c.json": f"{tmp_path}/c.json:2",
        "d.parquet": f"{tmp_path}/d.parquet:row 2",
    }


def test_bom_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    text = "\n\r\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(ROWS).encode())
    for name in ("a.jsonl", "b.json"):
        rows = rows_of(tmp_path / name)
        assert [(row.data, row.problem) for row in rows] == [(row, None) for row in ROWS]


def test_a_bad_line_names_line_column_and_excerpt_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": tru, "b": 2}\n{"a": 3}\n')
    good, bad, after = rows_of(path)
    assert (good.data, after.data) == ({"a": 1}, {"a": 3})
    assert bad.problem.startswith(f"{path}:2:7: not JSON") and '{"a": >>>tru, "b": 2}' in bad.problem


def test_a_truncated_last_line_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": "half a sent')
    assert rows_of(path)[1].problem.startswith(f"{path}:2:7: the last line is cut off")


def test_a_byte_that_is_not_utf8_is_found_with_its_offset(tmp_path: Path) -> None:
    first = '{"a": "é"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(first + '{"a": "né'.encode() + b'\xe9"}\n')
    problem = rows_of(tmp_path / "a.jsonl")[1].problem
    assert problem.startswith(f"{tmp_path}/a.jsonl:2:10: byte 0xe9 at offset {len(first) + 10} ")
    (tmp_path / "a.json").write_bytes(b'[\n{"a": "x\xe9"}]')
    with pytest.raises(DataError, match=r"a\.json:2:9: byte 0xe9 at offset 10 .* save the file as UTF-8"):
        rows_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}, {"a": ', r"a\.json:1:\d+: the array is cut off"),
        ("a.json", b'[{"a": 1}\n {"b": 2}]', r"a\.json:2:2: not JSON: Expecting ',' delimiter"),
        ("a.json", b'{\n "data": []\n}', "holds one JSON object, allowed is an array"),
        ("a.json", "[]".encode("utf-16"), "is UTF-16, allowed is UTF-8"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer.*git lfs pull"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file, or a damaged one"),
        ("a.xlsx", b"", r"cannot read files ending in \.xlsx, allowed are \.jsonl, \.ndjson, \.json, \.parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


def test_globs_and_folders_are_read_in_order_of_names(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        (tmp_path / f"part{number}.jsonl").write_text(f'{{"a": {number}}}\n')
    (tmp_path / "notes.txt").write_text("not data")
    for spelling in ("part*.jsonl", "./part*.jsonl", ".", str(tmp_path)):
        assert [row.data["a"] for row in rows_of(spelling, tmp_path)] == [1, 2, 3]


def test_a_shipped_set_is_found_by_name() -> None:
    assert "messages" in rows_of("llmtune:quickstart")[0].data
    with pytest.raises(DataError, match='Did you mean "quickstart"'):
        rows_of("llmtune:quikstart")


def test_a_missing_file_says_it_was_read_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r'read as a local path, but .* does not exist\. Did you mean "chats\.jsonl"'):
        rows_of("chat.jsonl", tmp_path)
    with pytest.raises(DataError, match="read as a local path"):
        rows_of("./chats", tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        rows_of("*.parquet", tmp_path)


def test_hub_ids_go_to_the_datasets_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> list:
        asked.append((name, subset, split))
        if name == "owner/none":
            raise ConnectionError("Couldn't reach the Hub\nlong story")
        return [{"a": 1, "b": None}]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows = rows_of("hub:owner/set", tmp_path, subset="en", split="test")
    assert asked == [("owner/set", "en", "test")] and rows == [({"a": 1}, 1, None)]
    message = "is no local path, so it was read as the hub data set owner/none.*Couldn't reach the Hub.*HF_HUB_OFFLINE"
    with pytest.raises(DataError, match=message):
        rows_of("owner/none", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        rows_of("hub:owner/set", tmp_path)


def test_a_hub_data_set_is_fetched_as_the_recipe_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: str
) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, subset: str | None, **more: Any) -> list[dict[str, Any]]:
        asked.append(more)
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return [{"messages": turns}] * 12

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    keys = {"model": tiny_llama, "dataset": "hub:owner/set", "cache_dir": str(tmp_path), "token": "hf_secret"}
    assert len(llmtune.plan(keys).data.prepared.train) == 12
    llmtune.check_data("hub:owner/set", model=tiny_llama, cache_dir=str(tmp_path), token="hf_secret")
    assert asked and all((more["cache_dir"], more["token"]) == (str(tmp_path), "hf_secret") for more in asked)


def test_parquet_nulls_read_like_absent_columns(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "name": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.data for row in rows_of(tmp_path / "a.parquet")] == rows
