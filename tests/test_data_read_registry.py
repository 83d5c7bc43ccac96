"""`dataset_info.json`: data sets by name, read as LLaMA-Factory describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.contract.errors import DataError
from llmtune.data import DataConfig, Dataset, Source, find, prepare
from tests.tiny import tiny_tokenizer

ROWS = [{"instruction": f"say {number}", "output": "so"} for number in range(30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    return tmp_path


def described(folder: Path, entry: Any, **own: Any) -> Dataset:
    (folder / "dataset_info.json").write_text(json.dumps({"chats": entry}))
    return find(Source(path="chats", **own), folder / "elsewhere", folder)


def test_a_file_and_the_defaults(folder: Path) -> None:
    found = described(folder, {"file_name": "a.json", "columns": None, "split": None})
    assert (found.name, found.files) == ("chats", (folder / "a.json",))
    assert (found.format, found.columns, found.exclusive, found.tags, found.ranking) == ("alpaca", {}, False, {}, False)


def test_a_folder_is_read_whole(folder: Path) -> None:
    (folder / "more").mkdir()
    for name in ("2.jsonl", "1.jsonl"):
        (folder / "more" / name).write_text("{}\n")
    assert [file.name for file in described(folder, {"file_name": "more"}).files] == ["1.jsonl", "2.jsonl"]


def test_given_columns_leave_out_all_others(folder: Path) -> None:
    entry = {"file_name": "a.json", "columns": {"prompt": "question", "response": "answer", "system": None}}
    found = described(folder, entry)
    assert found.columns == {"instruction": "question", "output": "answer"} and found.exclusive


@pytest.mark.parametrize(
    ("entry", "format", "columns"),
    [
        ({"columns": {"prompt": "body"}}, "text", {"text": "body"}),
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            "preference",
            {"instruction": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "turns", "kto_tag": "label"}},
            "kto",
            {"conversations": "turns", "kto_tag": "label"},
        ),
        ({"formatting": "openai", "columns": {"messages": "chat"}}, "openai", {"messages": "chat"}),
    ],
)
def test_the_kind_of_rows_follows_from_the_entry(folder: Path, entry: dict, format: str, columns: dict) -> None:
    found = described(folder, {"file_name": "a.json", **entry})
    assert (found.format, found.columns) == (format, columns)


def test_hub_sets_with_subset_split_and_folder(folder: Path) -> None:
    found = described(
        folder, {"hf_hub_url": "owner/set", "ms_hub_url": "x/y", "subset": "en", "split": "test", "folder": "sft"}
    )
    assert (found.hub, found.subset, found.split, found.folder, found.files) == ("owner/set", "en", "test", "sft", ())


def test_what_the_recipe_says_wins(folder: Path) -> None:
    entry = {
        "file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "turns", "tools": "tools"},
        "tags": {"role_tag": "who"}, "num_samples": 3,
    }  # fmt: skip
    own = described(folder, entry, columns={"conversations": "chat"}, tags={"content_tag": "what"}, num_samples=5)
    assert own.columns == {"conversations": "chat", "tools": "tools"} and own.num_samples == 5
    assert own.tags == {"role_tag": "who", "content_tag": "what"}
    other = described(folder, entry, format="openai")
    assert (other.format, other.columns, other.tags, other.exclusive) == ("openai", {}, {}, False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "x.py"}, "chats is loaded by a script, which llmtune does not run; name a file or a hub"),
        ({"ms_hub_url": "a/b"}, "chats is only at ms_hub_url, which cannot be read; download it and give file_name"),
        ({"cloud_file_name": "s3://a"}, "chats is only at cloud_file_name"),
        ({}, "chats names no place; give file_name or hf_hub_url"),
        ({"filename": "a.json"}, 'chats has the key "filename", which is unknown. Did you mean "file_name"'),
        (
            {"file_name": "a.json", "formatting": "sharegtp"},
            'formatting "sharegtp", allowed are alpaca, sharegpt, openai',
        ),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, 'columns has "promt". Did you mean "prompt"'),
        ({"file_name": "a.json", "columns": "x"}, 'columns is "x", allowed is an object of names'),
        ({"file_name": "a.json", "tags": {"roletag": "x"}}, 'tags has "roletag". Did you mean "role_tag"'),
        ({"file_name": "a.json", "num_samples": "10"}, 'num_samples is "10", allowed is a whole number'),
        ({"file_name": "a.json", "num_samples": -1}, "num_samples is -1, allowed is 1 or more"),
        ({"file_name": "b.json"}, 'does not exist. Did you mean "a.json"'),
    ],
)
def test_entries_that_cannot_be_used(folder: Path, entry: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        described(folder, entry)
    assert message in str(caught.value)


def test_the_registry_lies_in_dataset_dir_beside_the_recipe_or_in_data(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "../a.json"}}))
    for base, dataset_dir in ((folder, None), (folder / "data", None), (folder, "data"), (Path("/"), folder / "data")):
        (file,) = find(Source(path="chats"), base, dataset_dir).files
        assert file.resolve() == folder / "a.json"
    with pytest.raises(DataError, match=r'no data set of this name\. Did you mean "chats"'):
        find(Source(path="chat"), folder, "data")
    with pytest.raises(DataError, match=r"dataset_dir: .* holds no dataset_info\.json"):
        find(Source(path="chats"), folder, ".")
    (folder / "data" / "dataset_info.json").write_text("[1]")
    with pytest.raises(DataError, match="allowed is an object of data sets by name"):
        find(Source(path="chats"), folder, "data")
    (folder / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        find(Source(path="chats"), folder, "data")


@pytest.mark.parametrize(("own", "rows"), [({}, 7), ({"num_samples": 40}, 40)])
def test_num_samples_of_the_registry_is_kept_to(
    folder: Path, own: dict, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(folder / "cache"))
    (folder / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "a.json", "num_samples": 7}}))
    config = DataConfig(dataset={"path": "chats", **own}, dataset_dir=str(folder))
    assert len(prepare(config, tiny_tokenizer(), seed=0).train) == rows
